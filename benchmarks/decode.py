"""What a risk costs: time per token with risk against plain Hugging Face ``generate``.

Same model, same run: the arms take turns, round by round, and each round gives every arm one time. A time per token is
``(t(n + 1 tokens) - t(1 token)) / n``, so that reading the prompt does not count; reading is ``t(1 token)``.

    python -m benchmarks.decode [--models pocket 135m 1b] [--tokens 32] [--rounds 7]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import results
from selfdoubt import sample, sculpt, vote
from selfdoubt.lm.decode import decode
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.probes import find_probes
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.lm.stepper import HFStepper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    },
    "3b": {
        "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
PROMPT = 32
NAMES = {
    "hf": "Hugging Face `generate`, no risk",
    "plain": "selfdoubt, no wrapper (scores of the distribution only)",
    "free": "selfdoubt, no wrapper, all free scores (RAUQ and late layers, too)",
    "bare": "the same steps without any score",
    "vote3": "vote, 3 voters of rank 16 on q and v",
    "sample5": "sample, 5 samples on q and v",
    "sculpt": "sculpt",
    "separate3": "3 separate passes (naive)",
}


def build(name: str) -> PreTrainedModel:
    """The pocket model, or a model of a known shape with random weights, in bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from selfdoubt import pocket

    model: Any
    if name == "pocket":
        model = AutoModelForCausalLM.from_pretrained(pocket.folder(), dtype=torch.bfloat16)
    else:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name], tie_word_embeddings=True, max_position_embeddings=2048))
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    built: PreTrainedModel = model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    return built


class Separate:
    """The naive ensemble: as many whole passes as members, one after the other."""

    context = None

    def __init__(self, model: nn.Module, members: int) -> None:
        self.passes = [HFStepper(model) for _ in range(members)]

    def start(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        for pieces in zip(*(p.start(prompts) for p in self.passes), strict=True):
            yield pieces[0][0], self._join([piece for _, piece in pieces])

    def step(self, ids: Tensor) -> StepOutput:
        return self._join([p.step(ids) for p in self.passes])

    def keep(self, sequences: Sequence[int]) -> None:
        for p in self.passes:
            p.keep(sequences)

    def extend(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        raise NotImplementedError("only decoding is timed")

    def join(self, other: Any) -> None:
        raise NotImplementedError("only one batch is timed")

    @staticmethod
    def _join(pieces: list[StepOutput]) -> StepOutput:
        return StepOutput(torch.cat([p.logits for p in pieces]), None)


def arms(model: nn.Module) -> dict[str, Callable[[list[int], int], object]]:
    """Each arm answers a prompt with so many tokens."""

    def ours(stepper: Callable[[], Any]) -> Callable[[list[int], int], object]:
        def run(prompt: list[int], tokens: int) -> object:
            now = stepper()
            _, following = prefill(now, [prompt])
            return list(decode(now, following, [len(prompt)], Sampling(max_tokens=tokens), [0]))

        return run

    def bare(prompt: list[int], tokens: int) -> object:
        now = HFStepper(model)
        following = list(now.start([prompt]))[-1][1].at(-1)
        for n in range(tokens):
            ids = following.logits[0].argmax(-1)
            if n + 1 < tokens:
                following = now.step(ids)
        return ids

    def hf(prompt: list[int], tokens: int) -> object:
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        with torch.inference_mode():
            return model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

    voters = vote.Wrapper(n_voters=3, rank=16)(model)
    samples = sample.Wrapper(n_samples=5)(model)
    scales = sculpt.Wrapper()(model)
    return {
        "hf": hf,
        "bare": bare,
        "plain": ours(lambda: HFStepper(model)),
        "free": ours(lambda: HFStepper(model, probes=find_probes(model))),
        "vote3": ours(lambda: HFStepper(voters)),
        "sample5": ours(lambda: HFStepper(samples)),
        "sculpt": ours(lambda: HFStepper(scales)),
        "separate3": ours(lambda: Separate(model, 3)),
    }


def measure(name: str, tokens: int, rounds: int) -> list[results.Row]:
    """Rows of one model."""
    model = build(name)
    runs = arms(model)
    vocabulary = int(model.config.vocab_size)
    prompt = torch.randint(10, vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    times: dict[str, dict[str, list[float]]] = {arm: {"token": [], "prompt": []} for arm in runs}
    for turn in range(rounds + 1):
        for arm, run in runs.items():
            spent = []
            for n in (1, tokens + 1):
                begin = time.perf_counter()
                run(prompt, n)
                spent.append(time.perf_counter() - begin)
            if turn:  # the first round warms up
                times[arm]["prompt"].append(spent[0])
                times[arm]["token"].append((spent[1] - spent[0]) / tokens)
        print(
            name,
            turn,
            {arm: f"{t['token'][-1] * 1e3:.1f} ms" for arm, t in times.items() if t["token"]},
            flush=True,
        )
    rows = []
    for arm, t in times.items():
        # Ratios of one round share the machine's mood: their median is steadier than a ratio of medians.
        ratio = median(a / b for a, b in zip(t["token"], times["hf"]["token"], strict=True))
        reading = median(a / b for a, b in zip(t["prompt"], times["hf"]["prompt"], strict=True))
        low, _, high = quantiles(t["token"], n=4)
        rows.append({
            "model": name, "arm": arm, "ratio": round(ratio, 3), "median": median(t["token"]),
            "spread": [low, high], "prompt_ratio": round(reading, 3), "unit": "seconds per token",
        })  # fmt: skip
    return rows


def table(record: dict[str, Any]) -> str:
    """The rows of one device as Markdown."""
    lines = []
    for row in record["rows"]:
        low, high = row["spread"]
        lines.append([
            f"{row['model']}: {NAMES[row['arm']]}", f"{row['median'] * 1e3:.2f}",
            f"{low * 1e3:.2f}-{high * 1e3:.2f}", f"{row['ratio']:.2f}x", f"{row['prompt_ratio']:.2f}x",
        ])  # fmt: skip
    head = ["model: arm", "ms per token, median", "quartiles", "to `generate`", "reading the prompt"]
    settings = record["settings"]
    about = (
        f"{record['device']}; bfloat16, one sequence, {settings['prompt']} tokens of prompt, {settings['tokens']} of "
        f"answer, {settings['rounds']} rounds; commit {record['commit']}, torch {record['versions']['torch']}, "
        f"transformers {record['versions']['transformers']}."
    )
    return results.markdown(head, lines) + "\n\n" + about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["pocket", "135m", "1b"], choices=["pocket", *SHAPES])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    rows = [row for name in chosen.models for row in measure(name, chosen.tokens, chosen.rounds)]
    print(results.write("decode", rows, prompt=PROMPT, tokens=chosen.tokens, rounds=chosen.rounds))


if __name__ == "__main__":
    main()
