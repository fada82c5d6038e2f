"""A tokenizer's chat template: conversations to text, with a date of one's own and within bounds of time and size."""

from __future__ import annotations

import contextlib
import datetime
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qtarget_megatron.data.tokenizer import one_line

# Limits of one rendering: seconds of this thread's processor time, and characters of any text it makes.
MAX_SECONDS = 20.0
MAX_CHARACTERS = 1 << 25

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Other names of reasoning_content, as transformers takes them.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Unrenderable(ValueError):
    """A chat template refuses a conversation, fails at it, or passes its bounds."""


class ChatTemplate:
    """The chat template of a tokenizer, for one conversation's tools; writes what apply_chat_template writes.

    date:         what strftime_now gives in the template, at midnight.
    dated:        whether the template asks for it.
    source:       the template's text, where it is known.
    has_blocks:   whether it marks the assistant's part itself, with ``{% generation %}`` blocks.
    leaves_tools: whether there are tools, which the template does not look at.

    Raises ValueError where the tokenizer has no template, or one that is no Jinja.
    """

    def __init__(
        self,
        tokenizer: Any,
        tools: Sequence[dict[str, Any]] | None,
        date: datetime.date,
        *,
        source: str | None = None,
    ):
        try:
            self.source = source or tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            raise ValueError(
                "the tokenizer has no chat template: use prompt/completion records or a tokenizer with a template"
            ) from error
        self._variables = {**tokenizer.special_tokens_map, "tools": tools, "documents": None}
        self._date, self._template = date, _compiled(self.source)
        self.has_blocks = bool(_GENERATION_BLOCK.search(self.source))
        self.dated = "strftime_now" in self.source
        self.leaves_tools = bool(tools) and "tools" not in _variables(self.source)

    def render(self, messages: Sequence[dict[str, Any]], generation_prompt: bool = False) -> str:
        """The text of a conversation. Unrenderable where the template makes none."""
        return self.render_blocks(messages, generation_prompt)[0]

    def render_blocks(
        self, messages: Sequence[dict[str, Any]], generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and the (begin, end) of each of its generation blocks."""
        environment: Any = self._template.environment  # a _BoundedEnvironment, with what transformers adds to it
        pieces: list[str] = []
        blocks: list[tuple[int, int]] = []
        variables = {
            **self._variables,
            "messages": _with_reasoning(messages),
            "add_generation_prompt": generation_prompt,
            "strftime_now": datetime.datetime.combine(self._date, datetime.time()).strftime,
        }
        try:
            with environment.bounds(), environment.activate_tracker(pieces, blocks):
                size = 0
                for piece in self._template.generate(variables):
                    pieces.append(piece)
                    size += len(piece)
                    environment.check_size(size)
        except _PassedBounds as error:
            raise Unrenderable(f"{error}: look at the template, and at this record") from None
        except Exception as error:  # whatever the template's expressions may raise
            reason = f"{type(error).__name__}: {one_line(error)}"
            if isinstance(error, jinja2.TemplateError | TypeError):
                reason = one_line(error)
            raise Unrenderable(f"the chat template cannot render this conversation: {reason}") from error
        return "".join(pieces), blocks


def writes_date(tokenizer: Any) -> bool:
    """Whether a chat template of the tokenizer, of which there may be several, asks for the date."""
    return "strftime_now" in str(tokenizer.chat_template)


def _with_reasoning(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their reasoning under both names that templates read."""
    result = []
    for message in messages:
        thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
        result.append(message if thought is None else {"thinking": thought, **message, "reasoning_content": thought})
    return result


def reasoning(message: dict[str, Any]) -> str:
    """The reasoning that a message carries beside its content; empty where it has none."""
    return next((str(message[name]) for name in _REASONING if message.get(name) is not None), "")


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # transformers' filters, globals and {% generation %} tag, of which it has no public list.
    theirs = _compile_jinja_template("").environment
    environment = _BoundedEnvironment(theirs)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tokenizer's chat template is no Jinja template: {one_line(error)}") from error


@functools.lru_cache(maxsize=8)
def _variables(source: str) -> frozenset[str]:
    """The names that a template takes from its caller."""
    return frozenset(jinja2.meta.find_undeclared_variables(_compiled(source).environment.parse(source)))


class _PassedBounds(Exception):
    """A rendering took too long or became too large."""


class _Ticking(jinja2.compiler.CodeGenerator):
    """Compiles a check into each turn of a loop and each call of a macro, and one into ``a ~ b``."""

    def visit_For(self, node: jinja2.nodes.For, frame: jinja2.compiler.Frame) -> None:
        node.body.insert(0, self._tick(node))
        super().visit_For(node, frame)

    def visit_Macro(self, node: jinja2.nodes.Macro, frame: jinja2.compiler.Frame) -> None:
        node.body.insert(0, self._tick(node))
        super().visit_Macro(node, frame)

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _tick(self, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        call = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("tick"), [], [], None, None)
        tick = jinja2.nodes.ExprStmt(call)
        return tick.set_environment(self.environment).set_lineno(node.lineno)


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, in which no rendering goes on for ever or fills the memory.

    Without the optimizer, which would compute constants of any size when the template is compiled.
    """

    code_generator_class = _Ticking
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, theirs: jinja2.Environment):
        super().__init__(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            extensions=[type(extension) for extension in theirs.extensions.values()],
            optimized=False,
        )
        self.globals.update({name: value for name, value in theirs.globals.items() if name != "range"})
        self.filters.update({name: self._bounded(function) for name, function in theirs.filters.items()})
        self._local = threading.local()

    @contextlib.contextmanager
    def bounds(self) -> Iterator[None]:
        """A rendering, whose time counts from here."""
        self._local.deadline = time.thread_time() + MAX_SECONDS
        try:
            yield
        finally:
            del self._local.deadline

    def tick(self) -> None:
        if time.thread_time() > getattr(self._local, "deadline", float("inf")):
            raise _PassedBounds(f"the chat template computes for more than {MAX_SECONDS:g} s")

    def check_size(self, size: float) -> None:
        """size: of a text or list that is to be made, or has been, as _length counts."""
        if size > MAX_CHARACTERS:
            raise _PassedBounds(f"the chat template makes a text of more than {MAX_CHARACTERS:,} characters")

    def concatenated(self, parts: Sequence[Any]) -> str:
        texts = [str(part) for part in parts]
        self.check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "*":
            self.check_size(_length(left) * _count(right))
            self.check_size(_length(right) * _count(left))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.check_size(left.bit_length() * right)
        elif operator == "+":
            self.check_size(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            self.check_size(_widest(left))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # Named as in jinja2: keywords of the template's call may have any other name.
        __self.tick()
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str):
            __self._check_arguments(getattr(__obj, "__name__", ""), (owner, *args))
        return super().call(__context, __obj, *args, **kwargs)

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            given = args[1:] if hasattr(function, "jinja_pass_arg") else args
            self._check_arguments(getattr(function, "__name__", ""), (*given, *kwargs.values()))
            result = function(*args, **kwargs)
            self.check_size(_length(result))
            return self._counted(result) if isinstance(result, Iterator) else result

        return bounded

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        size = 0
        for value in values:
            self.tick()
            size += 8 + _length(value)
            self.check_size(size)
            yield value

    def _check_arguments(self, name: str, values: Sequence[Any]) -> None:
        """Refuse arguments of a filter or a text's method that would make a text above the bound: a width, or what
        joins or repeats."""
        for value in values[1:]:
            self.check_size(_count(value))
        if "format" in name:
            self.check_size(_widest(str(values[0])))
        elif "join" in name:
            # entries|join(separator), or separator.join(entries)
            separator = max((len(value) for value in values if isinstance(value, str)), default=0)
            for entries in (value for value in values if isinstance(value, list | tuple)):
                self.check_size(sum(separator + _length(entry) for entry in entries))
        elif "replace" in name and len(values) > 2:
            text, old, new = (str(value) for value in values[:3])
            self.check_size(len(text) + text.count(old) * len(new))


def _length(value: Any) -> int:
    """Characters of a text; of a list eight for each entry, as many bytes as that takes."""
    return len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, list | tuple) else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _widest(form: str) -> int:
    """The largest number in a format, which may be a width."""
    return max((int(digits[:12]) for digits in re.findall(r"\d{6,}", form)), default=0)
