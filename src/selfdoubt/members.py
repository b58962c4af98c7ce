"""Members are rows: M variants of a model run as one M times larger batch.

``rows = members * batch``, member-major: row ``m * batch + b``. Frozen modules see an ordinary batch; only the replaced
leaves know that dimension 0 holds members. A wrapper (vote, sample, sculpt, density) chooses the leaves and their
replacements; ``Wrapped`` repeats the inputs for every member, runs the module once, and folds the rows back.

Wrappers compose, each around the one before. Voters around samples make their product: every voter has samples of its
own, and no two members share a noise. A base row, where the base model answers, is the first of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from selfdoubt import targets
from selfdoubt.errors import CaptureError, ConfigError, ShapeError, WrapError
from selfdoubt.forecast import Forecast, OutputKind, Prediction, check_no_nan, summarise
from selfdoubt.fused_layers import has_fused_leaves, switch_fused_layers_off
from selfdoubt.isolation import IsolationCheck, check_isolation
from selfdoubt.messages import show_message
from selfdoubt.model_inputs import InputNames, check_batch, explain_rows, find_batch_size, map_batch
from selfdoubt.model_outputs import check_batch_axis
from selfdoubt.rows import ForwardContext, Replacement, expand, unfold
from selfdoubt.scales import pair_scales
from selfdoubt.sharing import share_module
from selfdoubt.spec import Spec, check_order, describe_wrapping
from selfdoubt.time_axes import check_time_layers, find_time_layers
from selfdoubt.trained_state import TrainedState, has_other_weights
from selfdoubt.tree import iter_tensors, tree_map


class Wrapped(nn.Module):
    """A model whose matched leaves are replaced. Call it like the model; ask for ``return_risk=True``.

    Weights are shared with the original model, whose structure stays as it was: nothing is copied. Voters train beside
    frozen weights; samples and a sculpt train the weights themselves, which are the original's, too.
    A wrapped model starts in evaluation mode, in which a call predicts; ``train()`` and ``eval()`` switch as usual, but
    BatchNorm of a frozen model stays in evaluation mode.
    Calls from several threads run one after the other, since a call has state that its leaves share.
    """

    def __init__(self, model: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.spec: Spec = spec
        leaves = spec.find(model)
        check_order([wrapper.spec for wrapper in list_wrappers(model)], spec)
        self.call = ForwardContext()
        self.module = share_module(model, freeze=spec.freezes())
        self.leaf_names = [leaf.name for leaf in leaves]
        for index, leaf in reversed(list(enumerate(leaves))):  # leaves inside others first
            shared = replace(leaf, module=self.module.get_submodule(leaf.name))
            targets.replace_module(self.module, leaf.name, spec.make_leaf(shared, index, self.call))
        self.input_names: InputNames = model.input_names if isinstance(model, Wrapped) else InputNames.read(model)
        self.note_layers()
        self._has_fused_path = has_fused_leaves(self)
        self._is_compiled = bool(spec.compile)
        if isinstance(self.module, Wrapped):  # the innermost runs the model
            self.module._is_compiled |= self._is_compiled
            self.module._has_fused_path |= self._has_fused_path
        self._graph: Callable[..., Any] | None = None
        self.tests_members = (
            True  #: test at the first calls that members are rows of their own, as docs/gotchas.md says
        )
        self._isolation = IsolationCheck()
        self._lock = RLock()
        self._trained_state = TrainedState(self, self.list_member_parameters())
        self.register_load_state_dict_post_hook(_note_loaded)  # type: ignore[no-untyped-call]
        self.eval()
        if spec.verbose:
            show_message(describe_wrapping(spec, self, leaves))

    def forward(self, *args: Any, return_risk: bool = False, training: bool | None = None, **kwargs: Any) -> Any:
        """Return the model's own output structure: the mean over members or, in training, each row's own member.

        Until members are trained, the base model answers; ``answer_from`` of the wrapper says otherwise. Without
        ``return_risk`` it then runs alone, and costs what it costs unwrapped.

        Args:
            *args: The model's own inputs. Tensors as long as the first one share its batch axis.
            return_risk: Return ``(output, risk)``; the risk has the output's structure: the standard deviation over
                members (around the base, where that answers), sculpt's scale, or density's distance. It is None where
                an output has none, as that of one member alone.
            training: None follows ``self.training``. True: vote splits the batch over its voters, sample runs once.
            **kwargs: The model's own keyword inputs.

        Raises:
            ShapeError: If a training batch does not divide over the voters, or if no output has a batch axis.
            ConfigError: If a risk is asked for in training, where each row meets one member only.
            WrapError: If BatchNorm in training mode would mix members, or if the model calls itself.
        """
        training = self.training if training is None else training
        with self._hold():
            if training:
                return self._run_in_training(args, kwargs, return_risk=return_risk)
            has_base = self.answers_from_base
            if has_base and not return_risk:  # no member can change the answer
                return self.forward_rows(*args, only_base=True, **kwargs)[0]
            if count_members(self) + has_base > 1:
                return summarise(self.forecast(*args, **kwargs), return_risk=return_risk)
            y, scales = self.forward_rows(*args, base_row=False, **kwargs)
            if not return_risk:
                return y
            distances = self._measure_distances(kwargs) if scales is None or hasattr(self.spec, "measure") else None
            if distances is None and scales is not None:
                check_no_nan((y, scales), "predictions")
                return y, scales
            if distances is None:  # the only member has no other to disagree with
                return y, tree_map(lambda _: None, y)
            rows = len(distances)
            return y, tree_map(lambda x: distances if isinstance(x, Tensor) and x.ndim and len(x) == rows else None, y)

    def predict(self, *args: Any, **kwargs: Any) -> Prediction:
        """Return the prediction and its risk, in evaluation whatever the mode; arguments as in ``forward``.

        Example:
            >>> from selfdoubt import vote
            >>> mean, risk = vote.Wrapper(n_voters=3)(nn.Sequential(nn.Linear(4, 2))).predict(torch.ones(5, 4))
            >>> mean.shape == risk.shape == (5, 2)
            True
        """
        return Prediction(*self(*args, return_risk=True, training=False, **kwargs))

    def forecast(self, *args: Any, **kwargs: Any) -> Any:
        """Return every member's prediction: a ``Forecast`` in place of each output tensor that has a batch axis.

        It holds all kinds of uncertainty that the wrappers give, by name.
        """
        with self._hold():
            has_base = self.answers_from_base
            members = count_members(self) + has_base
            batch = self._batch_size(args, kwargs, members)
            rows = self._repeat(args, kwargs, members, batch)
            y, scales = self.forward_rows(*rows[0], base_row=has_base, **rows[1])
            distances = self._measure_distances(kwargs, members=members, required=False)
            if distances is not None:
                distances = unfold(distances, members)
                distances = distances[0] if has_base else distances.mean(0)
            kind: OutputKind = "logits" if self._output == "logits" else "values"

            def fold(x: Any, scale: Tensor | None) -> Any:
                if not isinstance(x, Tensor) or not x.ndim or len(x) != members * batch:
                    return x
                std = None if scale is None else unfold(self.distribution.std((x, scale)), members)
                values = unfold(x, members)
                if not has_base:
                    return Forecast(values, std, kind, density=distances)
                return Forecast(values[1:], None if std is None else std[:1], kind, values[0], distances)

            forecast = tree_map(fold, y, scales)
            check_batch_axis(y, members * batch, members)
            self._check_isolation(args, kwargs, y, members=members, base_row=has_base)
        logits = forecast.get("logits") if isinstance(forecast, Mapping) else None
        if self._output == "auto" and isinstance(logits, Forecast):
            forecast["logits"] = replace(logits, kind="logits")
        return forecast

    def forward_rows(
        self,
        *args: Any,
        training: bool = False,
        same_weights: bool = False,
        only_base: bool = False,
        base_row: bool | None = None,
        active: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run on rows that are already member-major.

        Args:
            *args: The model's own inputs.
            training: True runs the members of training.
            same_weights: True if no parameter has changed since the run before, as between the steps of an answer:
                leaves go on with copies that they keep of parameters.
            only_base: True runs the base model alone, on one row per entry of the batch.
            base_row: True if the base model has the first rows; None if a wrapper says ``answer_from="base"``.
            active: Positions at which voters deviate, ``(rows, t)``; None for all.
            **kwargs: The model's own keyword inputs.

        Returns:
            The module's output on rows, and sculpt's scales in the same structure (None without a sculpt).

        Raises:
            WrapError: If BatchNorm in training mode would mix members, if no replaced leaf was called, or if the model
                calls itself.
        """
        wrappers = list_wrappers(self)
        has_base = not training and (_find_answer_from(self) == "base" if base_row is None else base_row)
        members = 1 if only_base else count_members(self, training=training) + has_base
        rows = self._batch_size(args, kwargs)
        if members > 1 and any(norm.training for norm in self._batch_norms):
            raise WrapError(
                f"BatchNorm in training mode would mix the statistics of {members} members; call .eval() on the "
                "BatchNorm layers (finetune=True does it for you), or use GroupNorm or LayerNorm"
            )
        with self._hold():
            if self.call.is_running:
                raise WrapError("a wrapped model was called inside its own call; wrap the inner model alone")
            if training:
                self._trained_state.note_training()
            for wrapper in wrappers:
                wrapper.call.start(
                    members=members, rows=rows, training=training, has_base=only_base or has_base, active=active,
                    same_weights=same_weights, inputs=iter_tensors((args, kwargs)),
                )  # fmt: skip
            try:
                explaining = explain_rows((args, kwargs), members, [wrapper.call for wrapper in wrappers])
                with explaining, check_time_layers(self._time_layers, rows, members):
                    y = wrappers[-1]._run(args, kwargs)
            finally:
                for wrapper in wrappers:
                    wrapper.call.is_running = False
            for wrapper in wrappers:
                if not wrapper.call.reached:
                    raise WrapError(
                        f"none of the {len(wrapper.leaf_names)} replaced leaves was called "
                        f"({wrapper.leaf_names[0]}, ...): the model reads their weights itself; choose other layers "
                        "with param_filter"
                    )
            scales = [scale for wrapper in wrappers for scale in wrapper.call.scales]
            return y, pair_scales(y, scales) if scales else None

    def train(self, mode: bool = True) -> Wrapped:
        """Switch the mode as usual; the running statistics of a frozen model stay frozen: its norms only evaluate.

        Statistics are shared with the original model, which training must not change.
        """
        super().train(mode)
        self._trained_state.read(self)  # a graph, which may come next, cannot
        if any(wrapper.spec.freezes() for wrapper in list_wrappers(self)):
            for norm in (m for m in self.modules() if isinstance(m, _NormBase)):
                norm.eval()
        return self

    @property
    def has_members(self) -> bool:
        """True if a wrapper has members, voters or samples, which can answer or leave that to the base model."""
        return any(hasattr(wrapper.spec, "answer_from") for wrapper in list_wrappers(self))

    @property
    def answers_from_base(self) -> bool:
        """True if the base model answers: where a wrapper says so, and by default until members are trained."""
        choice = _find_answer_from(self)
        return choice == "base" or (choice is None and not self.is_trained)

    @property
    def is_trained(self) -> bool:
        """True if the members are trained: a parameter that the wrapper added has changed since wrapping, by a training
        step or by loading; for samples, any parameter that trains, after a training pass. Set it to say otherwise."""
        return self._trained_state.read(self)

    @is_trained.setter
    def is_trained(self, trained: bool) -> None:
        self._trained_state = TrainedState(self, self._trained_state.members, trained=trained)

    @property
    def distribution(self) -> Any:
        """The distribution of the sculpt in or under this wrapper; None without one."""
        distributions = (getattr(wrapper.spec, "distribution", None) for wrapper in list_wrappers(self))
        return next((d for d in distributions if hasattr(d, "nll")), None)

    def note_layers(self) -> None:
        """Note the layers that need care: BatchNorm, and those that may read rows as time."""
        self._batch_norms = [m for m in self.modules() if isinstance(m, _BatchNorm)]
        self._time_layers = find_time_layers(self.module)

    def list_member_parameters(self) -> frozenset[str]:
        """Return the names of the parameters that make this wrapper's members, and that train; none without members."""
        names: set[str] = set()
        for name, module in self.named_modules() if hasattr(self.spec, "answer_from") else ():
            if isinstance(module, Replacement) and module.call is self.call:
                trains = (key for key, p in module.named_parameters() if p.requires_grad)
                names |= {f"{name}.{key}" for key in trains if not key.startswith("leaf.")}
        return frozenset(names)

    def extra_repr(self) -> str:
        """Return the settings, which ``print(wrapped)`` shows."""
        return repr(self.spec)

    @contextmanager
    def _hold(self) -> Iterator[None]:
        """Let other threads wait until the block ends; a graph runs without locks."""
        if torch.compiler.is_compiling():
            yield
        else:
            with self._lock:
                yield

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model inside all wrappers, of which this is the innermost."""
        with switch_fused_layers_off(self._has_fused_path):
            return self._run_graph(*args, **kwargs) if self._is_compiled else self.module(*args, **kwargs)

    def _run_in_training(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, return_risk: bool) -> Any:
        self._check_split(args, kwargs)
        y, scales = self.forward_rows(*args, training=True, **kwargs)
        self._check_isolation(args, kwargs, y, members=1, training=True)
        if not return_risk:
            return y
        if scales is None:
            reason = (
                "each row meets one member, so members cannot disagree" if self.has_members
                else "a density is not measured, as its statistics would be stale"
            )  # fmt: skip
            raise ConfigError(f"in training {reason}; ask for return_risk=True with training=False, or call .eval()")
        return y, scales

    def _measure_distances(
        self, kwargs: Mapping[str, Any], members: int = 1, *, required: bool = True
    ) -> Tensor | None:
        """Return the distances of the last call's features, ``(rows, *positions)``; None without a density.

        Args:
            kwargs: Keyword inputs of the batch, with its attention mask, if it has one.
            members: Number of times that the batch was repeated.
            required: False gives None for a density that is not fitted.
        """
        measure = next((m for w in list_wrappers(self) if (m := getattr(w.spec, "measure", None)) is not None), None)
        if measure is None:
            return None
        distances: Tensor | None = measure(self, kwargs.get("attention_mask"), members=members, required=required)
        return distances

    @property
    def _shared_inputs(self) -> tuple[str, ...]:
        return tuple(name for wrapper in list_wrappers(self) for name in wrapper.spec.shared_inputs)

    @property
    def _output(self) -> str:
        outputs = (wrapper.spec.output for wrapper in list_wrappers(self))
        return next((output for output in outputs if output != "auto"), "auto")

    def _run_graph(self, *args: Any, **kwargs: Any) -> Any:
        if self._graph is None:
            # As an attribute of this module it would be another module in it, with all weights again in the state.
            object.__setattr__(self, "_graph", torch.compile(self.module, fullgraph=True))
        assert self._graph is not None
        try:
            return self._graph(*args, **kwargs)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
            where = error.real_stack[-1] if getattr(error, "real_stack", None) else None
            source_line = f"{where.filename}:{where.lineno}: {where.line}" if where else "an unknown line"
            reason = str(error).strip().splitlines()[0]
            raise CaptureError(
                f"compile=True needs one graph, and {source_line} cannot be captured ({reason}); "
                "use compile=False, the default"
            ) from None

    def _batch_size(self, args: tuple[Any, ...], kwargs: dict[str, Any], members: int = 1) -> int:
        """Return the size of a batch, which is checked where it must be repeated or split."""
        inputs, shared = self.input_names.match(args) | kwargs, self._shared_inputs
        batch = find_batch_size(inputs, shared, self.input_names)
        if members > 1:
            check_batch(inputs, shared, batch)
        return batch

    def _repeat(self, args: tuple[Any, ...], kwargs: dict[str, Any], members: int, batch: int) -> Any:
        """Return the inputs for all members, positional and keyword ones."""
        repeat = partial(expand, members=members)
        return map_batch(repeat, args, kwargs, self.input_names, self._shared_inputs, batch)

    def _check_isolation(self, args: Any, kwargs: dict[str, Any], y: Any, *, members: int, **how: Any) -> None:
        """Test once per kind of call whether members are rows of their own; inputs are repeated for ``members``."""
        contexts = [w.call for w in list_wrappers(self) if hasattr(w.spec, "answer_from")]
        if not self.tests_members or self._is_compiled or not self._isolation.is_due(contexts, (args, kwargs)):
            return

        def run(twin: Wrapped, **more: Any) -> Any:
            batch = contexts[0].rows // members
            copies = map_batch(torch.clone, args, kwargs, self.input_names, self._shared_inputs, batch)
            rows = self._repeat(*copies, members, batch)
            with torch.set_grad_enabled(torch.is_grad_enabled() and "training" not in how):  # a graph takes memory
                return twin.forward_rows(*rows[0], **rows[1], **how, **more)[0]

        is_repeated = "training" not in how  # then the same rows lie in several places
        check_isolation(self, contexts[0], y, run, has_time=is_repeated and bool(self._time_layers))

    def _check_split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        members = count_members(self, training=True)
        batch = self._batch_size(args, kwargs, members)
        if batch % members:
            raise ShapeError(
                f"in training a batch is split over the {members} members, and {batch} rows do not divide by "
                f"{members}; use a multiple of {members}, or training=False (or .eval()) to predict"
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Remember whether members are trained, which they are by weights that differ from those that are here."""
        self._trained_state.is_trained = self.is_trained or has_other_weights(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of copies, which have a lock, a graph and a record of training of their own."""
        record = self._trained_state.members, self.is_trained
        return {**self.__dict__, "_lock": None, "_graph": None, "_trained_state": record}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state, with a new lock."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        members, trained = state["_trained_state"]
        self._lock, self._trained_state = RLock(), TrainedState(self, members, trained=trained)


def list_wrappers(model: nn.Module) -> list[Wrapped]:
    """Return the wrappers around a model, the outermost first; none for a plain model."""
    return [model, *list_wrappers(model.module)] if isinstance(model, Wrapped) else []


def count_members(model: nn.Module, *, training: bool = False) -> int:
    """Return the number of members of all wrappers around a model, without the base model; 1 for a plain model."""
    members = 1  # a loop, which graphs can capture
    for wrapper in list_wrappers(model):
        members *= wrapper.spec.members(training=training) - (wrapper.spec.has_base and not training)
    return members


def count_rows(model: nn.Module) -> int:
    """Return the number of rows of one sequence in ``forward_rows``: its members, and the base model if it answers."""
    return count_members(model) + has_base_row(model)


def has_base_row(model: nn.Module) -> bool:
    """Return True if a wrapper says that the base model answers, which then has the first row of a sequence."""
    return _find_answer_from(model) == "base"


def _find_answer_from(model: nn.Module) -> str | None:
    """Return the choice of the outermost wrapper that makes one; "mean" where none has members."""
    choices = [w.spec.answer_from for w in list_wrappers(model) if hasattr(w.spec, "answer_from")]
    return next((choice for choice in choices if choice is not None), None) if choices else "mean"


def _note_loaded(wrapped: Any, incompatible_keys: Any) -> None:  # noqa: ARG001
    wrapped.is_trained = wrapped._trained_state.is_trained  # as before the load, which has changed parameters
