"""Which reward, which prompts, which method."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .base import Group, Name


class Experiment(Group):
    """Which reward, which prompts, which method."""

    method: Annotated[str, Name] = Field(
        "nabla-db",
        min_length=1,
        description="nabla-db (residual ∇-DB, the paper), nabla-db-lambda (∇-DB(λ)), "
        "nabla-db-pool (∇-DB on a pool), reward-weighted, adjoint-matching, terminal-gradient, "
        "refl, draft-k, draft-lv, alignprop, ddpo or dag-db (docs/methods.md compares them), or "
        "package.module:object for your own",
    )
    reward_fn: str = Field(
        "aesthetic",
        min_length=1,
        description="a built-in reward, or package.module:function for your own "
        "(images [B,3,H,W] in [0,1], prompts, metadata) -> [B]; or a sum of these, "
        "'0.7*hpsv2 + 0.3*aesthetic - 0.1*jpeg-size', minus to minimise",
    )
    prompt_fn: str = Field(
        "simple_animals",
        min_length=1,
        description="a built-in prompt set, or a .txt, .json or .csv file of prompts",
    )
