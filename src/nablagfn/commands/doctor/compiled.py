"""A compiled step beside the plain one: what torch.compile gives must be the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...config import Speed
from ...core import rng
from ...core.lookahead import predicted_clean, without_theta
from ...families import find_family
from ...methods.build import build_kernel
from ...runtime.distributed import weight_dtype
from .records import Finding, Patient

ROWS = 2
ROUNDS = 2  # every pass comes again after all the others
MOVE = 0.02  # standard deviation of what is added to θ, which at its start changes nothing
BOUND, HALF_BOUND = 0.01, 0.2  # ‖compiled − plain‖ / ‖plain‖; the latter for 16-bit weights


def compiled(patient: Patient) -> Finding:
    """Every kind of pass, in turns: its values, and its gradients for x_k and θ."""
    if not patient.config.speed.compiles:
        return Finding("ok", "not used")
    if find_family(patient.config).skeleton is None:
        return Finding("ok", "not used: a world is not compiled")
    fix = f"leave {_switches(patient.config.speed)} out"
    step = TrainingStep(patient)
    with _moved(patient.policy.parameters()):
        with torch.compiler.set_stance("force_eager"):
            plain = {name: run() for name, run in step.passes.items()}
        try:
            found = [
                (_distance(run(), plain[name]), name)
                for _ in range(ROUNDS)
                for name, run in step.passes.items()
            ]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return Finding("failure", text, fix)
    half = weight_dtype(patient.config, patient.device) != torch.float32
    bound = HALF_BOUND if half else BOUND
    wrong = dict.fromkeys(name for far, name in found if not far <= bound)
    largest = max(far for far, _ in found)
    text = f"off by {largest:.2g} of the plain step (bound {bound:g})"
    if wrong:
        return Finding("failure", f"{text}: {', '.join(wrong)}", fix)
    return Finding("ok", text)


class TrainingStep:
    """The passes a training step is made of, on ROWS rows. Each gives its values and gradients."""

    def __init__(self, patient: Patient) -> None:
        self.policy, self.reward = patient.policy, patient.reward
        shape = self.policy.sample_shape
        self.x = rng.normal(shape, range(ROWS), seed=0, purpose="doctor").to(patient.device)
        table = build_kernel(patient.config, self.policy)
        self.k = table.at_step(table.num_steps // 2, self.x)
        asked = patient.prompts.prompts[:1] * ROWS
        self.where = self.policy.condition(asked, patient.prompts.metadata(asked))
        self.passes: dict[str, Callable[[], list[Tensor]]] = {
            "drawing": self.drawing,
            "drawing of the frozen model": self.drawing_frozen,
            "frozen model": self.frozen,
            "guess without θ": self.guess,
            "tuned model": self.tuned,
        }

    def _eps(self, x: Tensor) -> Tensor:
        return self.policy.output(x, self.k.here.time, self.where)

    def _differentiated(self, x: Tensor, also: Sequence[Tensor] = ()) -> list[Tensor]:
        loss = self._eps(x).square().mean()
        return [loss.detach(), *_gradients(loss, [x, *also])]

    def drawing(self) -> list[Tensor]:
        """ε_θ."""
        with torch.no_grad():
            return [self._eps(self.x)]

    def drawing_frozen(self) -> list[Tensor]:
        """ε_#."""
        with self.policy.reference():
            return self.drawing()

    def frozen(self) -> list[Tensor]:
        """The loss of ε_# and its gradient for x."""
        with self.policy.reference():
            return self._differentiated(self.x.clone().requires_grad_())

    def guess(self) -> list[Tensor]:
        """r(x̂_θ(x)) and its gradient for x; the picture's where the reward has none."""
        x = self.x.clone().requires_grad_()
        with without_theta(self.policy):
            images = self.policy.decode(predicted_clean(self.policy, x, self.k, self.where)).float()
            pictures = images if self.reward.differentiable else images.detach()
            value = self.reward(pictures, self.where.prompts, self.where.metadata)
            summed = (value if self.reward.differentiable else images.square()).sum()
            return [value.detach(), *_gradients(summed, [x])]

    def tuned(self) -> list[Tensor]:
        """The loss of ε_θ and its gradients for x and θ."""
        return self._differentiated(self.x.clone().requires_grad_(), self.policy.parameters())


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of the first input, and of all others as one; zero where none arrives."""
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    full = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]
    rest = [g.flatten() for g in full[1:]]
    return [full[0], torch.cat(rest)] if rest else full


def _distance(found: Sequence[Tensor], known: Sequence[Tensor]) -> float:
    """The largest ‖found − known‖ / ‖known‖, infinite where a value is not finite."""
    pairs = [
        (one.double().cpu(), two.double().cpu()) for one, two in zip(found, known, strict=True)
    ]
    far = [(one - two).norm() / two.norm().clamp_min(1e-30) for one, two in pairs]
    return float(torch.stack(far).nan_to_num(nan=torch.inf).max())


@contextmanager
def _moved(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside it θ is away from its start, where the tuned model is the frozen one."""
    home = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for row, p in enumerate(parameters):
            noise = rng.normal(tuple(p.shape), [row], seed=0, purpose="doctor")[0]
            p.add_(MOVE * noise.to(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, home, strict=True):
                p.copy_(value)


def _switches(speed: Speed) -> str:
    names = ("compile", "compile_reward", "cuda_graphs")
    return " and ".join(f"config.speed.{name}" for name in names if getattr(speed, name))
