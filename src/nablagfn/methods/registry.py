"""The methods by name: one entry each. Needs no torch."""

from __future__ import annotations

from ..config import Config, ConfigError
from ..config.dotted import find_object
from ..core.samplers import POSTERIOR, amount_of, find_sampler, forgets, misses
from .record import Aim, Alive, Method

KEY = "config.experiment.method"
EITHER = ("paths", "pool")  # of those whose loss holds for paths that others have drawn
ESTIMATORS, OBJECTIVES = f"{__package__}.estimators", f"{__package__}.objectives"


def with_flow(config: Config) -> bool:
    return not config.model.no_flow


def _lambda_learns(config: Config) -> bool:
    """λ = 1 over whole paths is the lean adjoint, and needs no V."""
    m = config.method
    return (m.return_lambda < 1 or m.window > 0) and not config.model.no_flow


def _lambda_sweeps(config: Config) -> bool:
    return config.method.window > 0 or config.method.return_lambda > 0


def _lambda_mirrors(config: Config) -> bool:
    """A pool's steps were drawn by other means, and taken by what they led to."""
    return not _lambda_sweeps(config) and source_of(config) == "paths"


def _lambda_alive(config: Config) -> Alive:
    """The frozen model's at x_k, and the guess's beside it unless both are one."""
    sweeps, tuned = _lambda_sweeps(config), config.method.guess_model == "finetuned"
    return Alive(1 if sweeps and not tuned else 2, 2 if tuned and not sweeps else 1)


def _lambda_uneven(config: Config) -> str:
    m = config.method
    if m.return_lambda == 0 or m.window:
        return ""
    return (
        f"config.method.return_lambda={m.return_lambda:g} over whole trajectories, whose processes "
        "make different numbers of passes: set config.method.window, or "
        "config.method.return_lambda=0"
    )


def _lambda_guesses(config: Config) -> bool:
    """The lean adjoint of whole paths starts from the reward at their ends, and never guesses."""
    return config.method.window > 0 or config.method.return_lambda < 1


def always(config: Config) -> bool:
    return True


def uneven(config: Config) -> str:
    """Say that a method's passes depend on the steps that a process drew."""
    same = ", ".join(name for name, method in METHODS.items() if method.uneven is not uneven)
    return (
        f"{KEY}={config.experiment.method}: its processes make different numbers of passes; take "
        f"one of {same}"
    )


METHODS = {
    method.name: method
    for method in (
        Method(
            "nabla-db",
            build=f"{__package__}.nabla_db:build",
            has_prior=True,
            alive=lambda config: Alive(1, 1, kept=with_flow(config)),
            learns_flow=with_flow,
            guesses=True,
            slopes=always,
            sources=EITHER,
        ),
        Method(
            "nabla-db-pool",
            build=f"{OBJECTIVES}.reweighted:build_pool",
            has_prior=True,
            alive=lambda config: Alive(0, 1),
            sources=("pool",),
            carries=True,
        ),
        Method(
            "reward-weighted",
            build=f"{OBJECTIVES}.reweighted:build_reward_weighted",
            has_prior=True,
            alive=lambda config: Alive(None, 1),
            sources=("pool",),
        ),
        Method(
            "nabla-db-lambda",
            build=f"{ESTIMATORS}.nabla_db_lambda:build",
            has_prior=True,
            alive=_lambda_alive,
            learns_flow=_lambda_learns,
            guesses=True,
            slopes=_lambda_guesses,
            uneven=_lambda_uneven,
            sources=EITHER,
            sweeps=_lambda_sweeps,
            mirrors=_lambda_mirrors,
        ),
        Method(
            "adjoint-matching",
            build=f"{ESTIMATORS}.adjoint_matching:build",
            has_prior=True,
            alive=lambda config: Alive(0, 1),
            uneven=uneven,
            sources=EITHER,
            sweeps=always,
        ),
        Method(
            "terminal-gradient",
            build=f"{ESTIMATORS}.terminal_gradient:build",
            has_prior=True,
            alive=lambda config: Alive(0, 1),
            sources=EITHER,
        ),
        Method(
            "refl",
            build=f"{OBJECTIVES}.refl:build",
            has_prior=False,
            alive=lambda config: Alive(1, 0),
        ),
        Method(
            "draft-k",
            build=f"{OBJECTIVES}.draft:build",
            has_prior=False,
            alive=lambda config: Alive(
                min(config.method.draft_steps, config.sampling.num_steps), 0
            ),
        ),
        Method(
            "draft-lv",
            build=f"{OBJECTIVES}.draft_lv:build",
            has_prior=False,
            alive=lambda config: Alive(1, 0),
        ),
        Method(
            "alignprop",
            build=f"{OBJECTIVES}.draft:build_alignprop",
            has_prior=False,
            alive=lambda config: Alive(config.sampling.num_steps, 0),  # at most
            uneven=uneven,
        ),
        Method(
            "ddpo",
            build=f"{OBJECTIVES}.ddpo:build",
            has_prior=False,
            alive=lambda config: Alive(None, 1),
        ),
        Method(
            "dag-db",
            build=f"{OBJECTIVES}.dag_db:build",
            has_prior=True,
            alive=lambda config: Alive(None, 1),
            learns_flow=always,
            guesses=True,
            uneven=uneven,
        ),
        Method(
            "vgg-flow",
            build=f"{OBJECTIVES}.vgg_flow:build",
            has_prior=True,
            alive=lambda config: Alive(1, 2 if with_flow(config) else 1),
            learns_flow=with_flow,
            guesses=True,
            ode=True,
        ),
    )
}


def find_method(name: str) -> Method:
    """One of this package, or `package.module:object`. Raises ConfigError when there is none."""
    return find_object(name, METHODS, KEY, Method)


def target_of(config: Config, factor: float = 1.0) -> Aim:
    """The run's target; factor: what the guard has multiplied β by."""
    method, strength = find_method(config.experiment.method), config.model.pretrained_strength
    if not method.has_prior:
        return Aim(None, f"{method.name} has no prior term, and so no target at any β")
    if method.ode:
        return Aim(
            None,
            f"{method.name} draws paths without noise, which have no density: it weighs β·r against"
            " a transport cost, and its optimum is another than p_pretrained·exp(βr)",
        )
    if strength != 1:
        return Aim(
            None,
            f"with config.model.pretrained_strength={strength:g} the target is another than "
            "p_pretrained·exp(βr), which needs 1",
        )
    reason = misses(config.sampling)
    if reason:
        return Aim(
            None,
            f"config.sampling.scheduler={config.sampling.scheduler} does not lead to "
            f"p_pretrained·exp(βr): {reason}. ddpm does",
        )
    return Aim(config.model.reward_scale * factor)


def amount_of_run(config: Config) -> float:
    """How much noise the run's paths have (`samplers.amount_of`): 0 for a method that draws them
    without any."""
    noisy = amount_of(config.sampling)
    return 0.0 if find_method(config.experiment.method).ode else noisy


def check_settings(config: Config) -> None:
    """Raises ConfigError, one line, for settings that contradict each other or name what is not."""
    config.check()
    amount_of(config.sampling)
    check_method(config)


def check_method(config: Config) -> None:
    """Raises ConfigError for an unknown method, and for options that it cannot have."""
    method, decoder = find_method(config.experiment.method), config.model.guess_decoder
    if decoder and not method.guesses:
        able = ", ".join(name for name, known in METHODS.items() if known.guesses)
        raise ConfigError(
            f"config.model.guess_decoder={decoder!r} has no use in {method.name}, which guesses no "
            f"reward: leave it out, or take {able}"
        )
    check_source(config, method)
    check_estimate(config, method)
    check_ode(config, method)
    reason = method.uneven(config)
    if config.training.shard_base and reason:
        raise ConfigError(f"config.training.shard_base=True does not go with {reason}")


def check_estimate(config: Config, method: Method) -> None:
    """Raises ConfigError for ways to v̂ that the method has not."""
    m = config.method
    if m.guess != "gradient" and not method.slopes(config):
        raise ConfigError(
            f"config.method.guess={m.guess} has no use in {KEY}={method.name} with these settings, "
            "which takes no gradient of a guess: leave it out, or take nabla-db or nabla-db-lambda"
        )
    if m.clip_quantile < 1 and not method.sweeps(config):
        raise ConfigError(
            f"config.method.clip_quantile={m.clip_quantile:g} has no use in {KEY}={method.name} "
            "with these settings: leave it at 1, or take adjoint-matching, or nabla-db-lambda with "
            "config.method.window or config.method.return_lambda"
        )
    if m.mirror and not method.mirrors(config):
        raise ConfigError(
            f"config.method.mirror=True has no use in {KEY}={method.name} with these settings: it "
            "is for nabla-db-lambda with config.method.window=0, config.method.return_lambda=0 and "
            "config.training.source=paths"
        )


def check_ode(config: Config, method: Method) -> None:
    """Raises ConfigError for settings that need noise, where the paths have none."""
    if not method.ode:
        return
    if config.sampling.eta != 1:
        raise ConfigError(
            f"config.sampling.eta={config.sampling.eta:g} has no use in {KEY}={method.name}, which "
            "draws its paths without noise: leave it at 1"
        )
    rule = find_sampler(config.sampling.scheduler).rule
    if rule != POSTERIOR:
        raise ConfigError(
            f"config.sampling.scheduler={config.sampling.scheduler} has no use in "
            f"{KEY}={method.name}, which draws its paths without noise: take ddpm"
        )
    if config.sampling.final_sigma:
        raise ConfigError(
            f"config.sampling.final_sigma={config.sampling.final_sigma:g} has no use in "
            f"{KEY}={method.name}, whose last step needs no noise: set it to 0"
        )
    if config.guard.max_path_kl:
        raise ConfigError(
            f"config.guard.max_path_kl={config.guard.max_path_kl:g} has no use in "
            f"{KEY}={method.name}, whose paths have no noise and so no KL: set "
            "config.guard.min_diversity or config.guard.max_held_out_drop instead"
        )


def source_of(config: Config) -> str:
    """What the run learns from: "paths" or "pool"."""
    chosen = config.training.source
    return find_method(config.experiment.method).sources[0] if chosen == "auto" else chosen


def check_source(config: Config, method: Method) -> None:
    """Raises ConfigError for a source that the method cannot have, and for settings that do not go
    with a pool."""
    source, s = source_of(config), config.pool
    if source not in method.sources:
        raise ConfigError(
            f"config.training.source={source} does not go with {KEY}={method.name}: set "
            f"config.training.source={' or '.join(method.sources)}"
        )
    if s.looks and "paths" in method.sources:  # it does not learn from weights
        raise ConfigError(
            f"config.pool.looks={s.looks} has no use in {KEY}={method.name}, which learns from no "
            "weights of paths: set config.pool.looks=0"
        )
    check_shift(config, method)
    if source == "paths":
        return
    if s.size % s.images_per_prompt:
        raise ConfigError(
            f"config.pool.images_per_prompt={s.images_per_prompt} must divide "
            f"config.pool.size={s.size}"
        )
    if s.own_share and not round(s.own_share * s.images_per_prompt):
        raise ConfigError(
            f"config.pool.own_share={s.own_share:g} of config.pool.images_per_prompt="
            f"{s.images_per_prompt} is no path at all: give {1 / s.images_per_prompt:.2g} or more, "
            "or 0"
        )
    if s.gradient == "linear":
        check_linear(config)
    if config.model.unet_reg_scale and "paths" in method.sources:
        raise ConfigError(
            f"config.model.unet_reg_scale={config.model.unet_reg_scale:g} holds on to the "
            "parameters that drew the samples, and a pool's were drawn by others: set "
            "config.model.unet_reg_scale=0"
        )
    if not forgets(config.sampling):
        raise ConfigError(
            f"config.sampling.scheduler={config.sampling.scheduler} with config.sampling.eta="
            f"{config.sampling.eta:g} does not go with a pool, whose paths must forget their "
            "noise: set config.sampling.eta=1 and config.sampling.scheduler=ddpm"
        )


def check_shift(config: Config, method: Method) -> None:
    """Raises ConfigError where nothing would move the first state."""
    if not config.pool.shift_start:
        return
    if not method.carries:
        raise ConfigError(
            f"config.pool.shift_start=True has no use in {KEY}={method.name}, which follows no "
            "linear fit: set it to False"
        )
    if config.pool.gradient != "linear":
        raise ConfigError(
            "config.pool.shift_start=True needs config.pool.gradient=linear, not "
            f"{config.pool.gradient}"
        )


def check_linear(config: Config) -> None:
    """Raises ConfigError for what does not go with gradients of a linear fit."""
    s = config.pool
    for key, given, wanted in (
        ("looks", s.looks, 0),
        ("own_share", s.own_share, 0),
        ("gradient_share", s.gradient_share, 1),
    ):
        if given != wanted:
            raise ConfigError(
                f"config.pool.{key}={given:g} does not go with config.pool.gradient=linear: set it "
                f"to {wanted}, or config.pool.gradient=carried"
            )
