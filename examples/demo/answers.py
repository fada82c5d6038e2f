"""Ask a Hugging Face model folder questions and score held-out solutions, with transformers alone.

Nothing of qtarget_megatron is used here: what this module says about an exported model is an
opinion from outside.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HeldOutScore:
    """Means over the supervised tokens of held-out conversations.

    loss: mean -log p(y) in nats. trust: mean p(y). num_tokens: how many tokens were scored.
    """

    loss: float
    trust: float
    num_tokens: int


class Answerer:
    """A model folder opened with transformers, in float32 on the CPU.

    Args:
        folder: Hugging Face folder with config, safetensors and a tokenizer with a chat template.
    """

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from examples.demo.prepare import quiet_transformers

        # The launcher sets one thread for the training ranks; here nobody else is computing.
        torch.set_num_threads(os.cpu_count() or 1)
        with quiet_transformers():
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self.model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            ).eval()

    def answer(self, question: str, max_new_tokens: int = 160) -> str:
        """Return the greedy answer to one user message, without the end-of-turn token."""
        import torch

        ids = self._encode([{"role": "user", "content": question}], prompt_only=True)
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        return self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()

    def score(self, records: list[dict], max_tokens: int) -> HeldOutScore:
        """Score the last assistant message of each record, its end-of-turn token included.

        Args:
            records: {"messages": [...]} objects whose last message is the assistant's.
            max_tokens: a conversation is cut to this many input tokens, as training cuts it.

        Raises:
            ValueError: no assistant token is left to score.
        """
        import torch

        log_p_sum = trust_sum = 0.0
        num_tokens = 0
        for record in records:
            messages = record["messages"]
            prompt = self._encode(messages[:-1], prompt_only=True)
            ids = self._encode(messages, prompt_only=False)
            # The template's line break after the last turn is nothing the model must say.
            ids = ids[: len(ids) - ids[::-1].index(self.tokenizer.eos_token_id)][: max_tokens + 1]
            if len(ids) <= len(prompt):
                continue
            with torch.inference_mode():
                logits = self.model(torch.tensor([ids[:-1]])).logits[0, len(prompt) - 1 :]
            labels = torch.tensor(ids[len(prompt) :])
            log_p = torch.log_softmax(logits.double(), -1).gather(1, labels[:, None])
            log_p_sum += log_p.sum().item()
            trust_sum += log_p.exp().sum().item()
            num_tokens += len(labels)
        if num_tokens == 0:
            raise ValueError(f"no token to score: no record leaves room within {max_tokens} tokens")
        score = HeldOutScore(-log_p_sum / num_tokens, trust_sum / num_tokens, num_tokens)
        if not math.isfinite(score.loss):
            raise ValueError("the model gives a held-out loss that is not a number")
        return score

    def _encode(self, messages: list[dict], prompt_only: bool) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt_only)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
