"""Chat templates with tools in the manner of the common families: their structure and tokens, in other words.

Each writes what transformers renders of it: the texts around tools are shorter than the families' own.
"""

from small_tokenizers import byte_tokenizer

# Tools in the system message; results in a user's turn, several of them in one.
_QWEN_HEAD = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' + (messages[0].content + SEPARATOR if messages[0].role == 'system' else DEFAULT) }}
    {{- '# Tools\n\nWithin <tools></tools>:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}{{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>\n\nAnswer <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
"""
_QWEN_CALLS = r"""
                {%- if call.function is defined %}
                    {%- set call = call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
                {{- call.arguments if call.arguments is string else call.arguments | tojson }}
                {{- '}\n</tool_call>' }}
"""
_QWEN_RESULT = r"""
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# A turn of calls writes its line break with each call, not with its header.
QWEN25 = (
    _QWEN_HEAD.replace("SEPARATOR", r"'\n\n'").replace("DEFAULT", r"'You are Q.\n\n'")
    + r"""
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first)
           or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
            {%- for call in message.tool_calls %}
                {{- '\n' }}
"""
    + _QWEN_CALLS
    + r"""
            {%- endfor %}
        {{- '<|im_end|>\n' }}
"""
    + _QWEN_RESULT
)
# Reasoning is kept behind the last question only, and always written in a last answer.
QWEN3 = (
    _QWEN_HEAD.replace("SEPARATOR", r"'\n\n'").replace("DEFAULT", "''")
    + r"""
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' and message.content is string
           and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- if (loop.first and content) or not loop.first %}
                    {{- '\n' }}
                {%- endif %}
"""
    + _QWEN_CALLS
    + r"""
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
"""
    + _QWEN_RESULT
)
# The date in the system's turn; tools in the first question, or in the system's turn; one call at a time, whose result
# is written as JSON, also where it is text.
LLAMA3 = r"""
{{- bos_token }}
{%- set first = 'TOOLS' %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}
    {{- 'Environment: ipython\n' }}
{%- endif %}
{{- 'Today Date: ' + date_string + '\n\n' }}
{%- if tools is not none and first == 'system' %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\n\n' }}
    {%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- if tools is not none and first == 'user' %}
    {%- set question = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nAnswer with JSON for a function call.\n\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\n\n' }}
    {%- endfor %}
    {{- question + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('one call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# Tools before the last question, calls and results with ids of nine characters. SYSTEM: where the system text goes.
_MISTRAL = r"""
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set questions = turns | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- if system is defined and in_front %}
    {{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == questions[-1] %}
            {{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and system is defined and not in_front %}
            {{- '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message.content + '[/INST]' }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception('ids of calls must have nine characters') }}
            {%- endif %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] + ', "id": "' + call.id + '"}' + (']' + eos_token if loop.last else ', ') }}
        {%- endfor %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- elif message.role == 'tool' %}
        {%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 %}
            {{- raise_exception('ids of calls must have nine characters') }}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL = "{%- set in_front = false %}" + _MISTRAL  # the system text goes into a question that is the last message
MISTRAL_SMALL = "{%- set in_front = true %}" + _MISTRAL
# {% generation %} blocks with the header and the line break of the turn. Tools go by another name, and calls are not
# written but as content.
SMOLLM3 = r"""
{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + '\n' }}
{%- if messages[0].role == 'system' %}
    {{- '\n## Custom Instructions\n\n' + messages[0].content.rstrip() + '\n\n' }}
{%- endif %}
{%- if xml_tools %}
    {{- '### Tools\n\n<tools>\n' }}
    {%- for tool in xml_tools[:] %}
        {{- tool | string + '\n' }}
    {%- endfor %}
    {{- '</tools>\n\n' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
            {{- '<|im_start|>assistant\n' + content.lstrip('\n') + '<|im_end|>\n' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
SMOLLM3_BARE = SMOLLM3.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
# Arguments as text; an answer behind results has no header. R1: the prompt opens the thinking, turns are written
# without theirs.
DEEPSEEK_V3 = r"""
{%- set ns = namespace(is_tool=false, is_output_first=true, system='', first=true) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = ns.system + ('' if ns.first else '\n\n') + message.content %}
        {%- set ns.first = false %}
    {%- endif %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.is_tool = false %}
        {{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'assistant' and 'tool_calls' in message %}
        {%- set ns.is_tool = false %}
        {{- '<｜Assistant｜>' + ('' if message.content is none else message.content) + '<｜tool▁calls▁begin｜>' }}
        {%- for call in message.tool_calls %}
            {{- ('' if loop.first else '\n') + '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' }}
            {{- call['function']['name'] + '\n```json\n' + call['function']['arguments'] + '\n```<｜tool▁call▁end｜>' }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
    {%- elif message.role == 'assistant' %}
        {%- if ns.is_tool %}
            {{- '<｜tool▁outputs▁end｜>' + message.content + '<｜end▁of▁sentence｜>' }}
            {%- set ns.is_tool = false %}
        {%- else %}
            {{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
        {%- endif %}
    {%- elif message.role == 'tool' %}
        {%- set ns.is_tool = true %}
        {{- '<｜tool▁outputs▁begin｜>' if ns.is_output_first else '\n' }}
        {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
        {%- set ns.is_output_first = false %}
    {%- endif %}
{%- endfor %}
{%- if ns.is_tool %}
    {{- '<｜tool▁outputs▁end｜>' }}
{%- elif add_generation_prompt %}
    {{- '<｜Assistant｜>PROMPT' }}
{%- endif %}
"""
DEEPSEEK_R1 = DEEPSEEK_V3.replace("PROMPT", r"<think>\n")
DEEPSEEK_V3 = DEEPSEEK_V3.replace("PROMPT", "")

_IM = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
_LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_INST = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
_INST += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
_DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>"]
_DEEPSEEK += [
    f"<｜tool▁{what}▁{where}｜>" for what in ("calls", "call", "outputs", "output") for where in ("begin", "end")
]
# Name -> template, special tokens, beginning and end of a sequence.
FAMILIES = {
    "qwen2.5": (QWEN25, _IM, None, "<|im_end|>"),
    "qwen3": (QWEN3, _IM, None, "<|im_end|>"),
    "llama3": (LLAMA3.replace("TOOLS", "user"), _LLAMA, "<|begin_of_text|>", "<|eot_id|>"),
    "llama3 system": (LLAMA3.replace("TOOLS", "system"), _LLAMA, "<|begin_of_text|>", "<|eot_id|>"),
    "mistral": (MISTRAL, _INST, "<s>", "</s>"),
    "mistral small": (MISTRAL_SMALL, _INST, "<s>", "</s>"),
    "smollm3": (SMOLLM3, _IM, None, "<|im_end|>"),
    "smollm3 bare": (SMOLLM3_BARE, _IM, None, "<|im_end|>"),
    "deepseek-v3": (DEEPSEEK_V3, _DEEPSEEK, _DEEPSEEK[0], _DEEPSEEK[1]),
    "deepseek-r1": (DEEPSEEK_R1, _DEEPSEEK, _DEEPSEEK[0], _DEEPSEEK[1]),
}


def family_tokenizer(name: str):
    """A tokenizer of single bytes and the family's tokens, with its template."""
    template, special, bos, eos = FAMILIES[name]
    return byte_tokenizer(template, bos=bos, eos=eos, special=special, size=256)
