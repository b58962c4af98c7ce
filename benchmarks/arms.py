"""Ways to answer a prompt, with a risk and without: what ``decode`` and ``batch`` compare.

An arm's name says what runs: ``hf`` and ``hf-static`` are Hugging Face ``generate``; ``plain``, ``bare`` and ``free``
are selfdoubt without members; ``vote3`` has three voters, ``sample5`` five samples; ``-late`` means members in the last
quarter of the layers only, ``-answer`` voters that act from the answer on; ``separate3`` is three whole passes.
``+static``, ``+captured`` and ``+compiled`` run the same steps over a static cache, as CUDA graphs, or compiled.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from selfdoubt import sample, sculpt, vote
from selfdoubt.lm.decode import DecodeBatch, TokenSequence, decode_batch
from selfdoubt.lm.hardware import synchronize
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.probes import find_probes
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.static.decoder import StaticDecoder
from selfdoubt.lm.step_modes import check_step_mode, choose_step_mode
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.lm.stepper import HFStepper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
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
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
#: Longest context of a model with random weights.
_CONTEXT = 16384
_ABOUT = {
    "hf": "Hugging Face `generate`, no risk",
    "hf-rows": "Hugging Face `generate`, no risk, three equal rows",
    "hf-static": "Hugging Face `generate`, static cache and `torch.compile`, no risk",
    "bare": "selfdoubt's steps without any score",
    "plain": "selfdoubt, no wrapper (scores of the distribution only)",
    "free": "selfdoubt, no wrapper, all free scores (RAUQ and late layers, too)",
    "sculpt": "sculpt",
}
_MODES = {"eager": "", "static": ", static cache", "captured": ", CUDA graphs", "compiled": ", compiled"}
_NAME = re.compile(r"(?:(hf|hf-rows|hf-static|bare)|(?:(plain|free|sculpt)|(vote|sample)(\d+)(-late|-answer)?)"
                   r"(?:\+(static|captured|compiled))?|separate(\d+))")  # fmt: skip


class Times(NamedTuple):
    """Seconds of one run."""

    prompt: float  #: until the first token
    token: float  #: per further token, of the whole batch


Run = Callable[[Sequence[Sequence[int]], int], Times]


@dataclass(frozen=True)
class Arm:
    """One way to answer."""

    name: str
    kind: str
    members: int
    place: str  #: "", "late" or "answer"
    mode: str  #: "eager", "static", "captured" or "compiled"

    @property
    def about(self) -> str:
        """The arm in words."""
        if self.kind == "separate":
            return f"{self.members} separate passes (naive)"
        text = (
            _ABOUT.get(self.kind)
            or {
                "vote": f"vote, {self.members} voters of rank 16 on q and v",
                "sample": f"sample, {self.members} samples on q and v",
            }[self.kind]
        )
        place = {"": "", "late": ", last quarter of the layers", "answer": ", from the answer on"}[self.place]
        return text + place + _MODES[self.mode]


def parse_arm(name: str) -> Arm:
    """Return the arm of a name.

    Raises:
        ValueError: If there is none.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"no arm is called {name!r}; try hf, plain, vote3, vote3-late, sample5+captured, separate3")
    fixed, single, wrapper, members, place, mode, passes = match.groups()
    if passes:
        return Arm(name, "separate", int(passes), "", "eager")
    kind = fixed or single or wrapper
    return Arm(name, kind, int(members or 1), (place or "").removeprefix("-"), mode or "eager")


def choose_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(name: str) -> PreTrainedModel:
    """Return the pocket model, or one of a known shape with random weights, in bfloat16, built on its device."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from selfdoubt import pocket

    model: Any
    if name == "pocket":
        model = AutoModelForCausalLM.from_pretrained(pocket.folder(), dtype=torch.bfloat16)
        model.to(choose_device())
    else:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[name], tie_word_embeddings=True, max_position_embeddings=_CONTEXT)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with choose_device():
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    built: PreTrainedModel = model.eval().requires_grad_(False)
    return built


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights, each counted once: what a step reads at least."""
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())


def build_run(arm: Arm, model: PreTrainedModel) -> Run:
    """Return a function that answers prompts with so many tokens and measures its time."""
    if arm.kind.startswith("hf"):
        return _run_hf(model, rows=3 if arm.kind == "hf-rows" else 1, is_static=arm.kind == "hf-static")
    if arm.kind == "bare":
        return _run_bare(model)
    if arm.kind == "separate":
        return _run_ours(lambda: Separate(model, arm.members), None)
    wrapped = _wrap(arm, model)
    has_probes = arm.kind == "free"

    def stepper() -> HFStepper:
        return HFStepper(wrapped, probes=find_probes(wrapped) if has_probes else ())

    decoder: StaticDecoder | None = None
    if arm.mode != "eager":
        decoder = StaticDecoder(stepper, choose_step_mode(check_step_mode(arm.mode), model.device))
    return _run_ours(stepper, decoder)


def _wrap(arm: Arm, model: PreTrainedModel) -> nn.Module:
    layers = int(model.config.num_hidden_layers)
    late = "|".join(str(i) for i in range(layers - layers // 4, layers))
    where = {"param_filter": rf"layers\.({late})\.self_attn\.[qv]_proj"} if arm.place == "late" else {}
    if arm.kind == "vote":
        start = {"start": "answer"} if arm.place == "answer" else {}
        return vote.Wrapper(n_voters=arm.members, rank=16, **where, **start)(model)  # type: ignore[arg-type]
    if arm.kind == "sample":
        return sample.Wrapper(n_samples=arm.members, **where)(model)  # type: ignore[arg-type]
    return sculpt.Wrapper()(model) if arm.kind == "sculpt" else model


def _run_hf(model: PreTrainedModel, *, rows: int, is_static: bool) -> Run:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        """A criterion that never stops, and notes the time of each token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            synchronize(input_ids.device)
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def run(prompts: Sequence[Sequence[int]], tokens: int) -> Times:
        ids = torch.tensor([list(p) for p in prompts] * rows, device=model.device)
        clock = Clock()
        options = {"cache_implementation": "static"} if is_static else {}
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]), **options,
            )  # fmt: skip
        return _summarize(begin, clock.times)

    return run


def _run_bare(model: PreTrainedModel) -> Run:
    def run(prompts: Sequence[Sequence[int]], tokens: int) -> Times:
        begin, times = time.perf_counter(), []
        stepper = HFStepper(model)
        following = list(stepper.start(prompts))[-1][1].at(-1)
        for n in range(tokens):
            ids = following.logits[0].argmax(-1)
            ids.tolist()
            times.append(time.perf_counter())
            if n + 1 < tokens:
                following = stepper.step(ids)
        return _summarize(begin, times)

    return run


def _run_ours(build_stepper: Callable[[], Any], decoder: StaticDecoder | None) -> Run:
    def run(prompts: Sequence[Sequence[int]], tokens: int) -> Times:
        begin, times = time.perf_counter(), []
        stepper = build_stepper()
        _, following = prefill(stepper, prompts)
        sequences = [TokenSequence(i, Sampling(max_tokens=tokens), i, 2**62) for i in range(len(prompts))]
        batch: Any = DecodeBatch(stepper, following, sequences)
        if decoder is not None:
            batch = decoder.start(stepper, following, sequences)
            if batch is None:
                raise RuntimeError(f"the model cannot have a static cache: {decoder.obstacle}")
        for n, _ in enumerate(decode_batch(batch)):
            if n % len(prompts) == 0:
                times.append(time.perf_counter())
        return _summarize(begin, times)

    return run


def _summarize(begin: float, times: Sequence[float]) -> Times:
    return Times(times[0] - begin, (times[-1] - times[0]) / max(1, len(times) - 1))


class Separate:
    """The naive ensemble: as many whole passes as members, one after the other."""

    context = None

    def __init__(self, model: nn.Module, members: int) -> None:
        self.passes = [HFStepper(model) for _ in range(members)]

    def start(self, prompts: Sequence[Sequence[int]], **options: Any) -> Iterator[tuple[int, StepOutput]]:
        for pieces in zip(*(p.start(prompts, **options) for p in self.passes), strict=True):
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
