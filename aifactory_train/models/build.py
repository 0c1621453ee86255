"""A model as parts, from our own decoder or from the code of `transformers`, and its first weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from aifactory_train.errors import PlanError
from aifactory_train.models import decoder
from aifactory_train.models.parts import ModelParts
from aifactory_train.recipe.schema import Model


def build_model(model: Model, model_code: str, layers: range | None = None) -> ModelParts:
    """The model, or one stage of it, without weights. Called under `torch.device("meta")`.

    Args:
        model_code: "own" or "transformers".
        layers: of a pipeline stage; only of our own decoder.

    Raises:
        PlanError: the code has no such model, or cannot be cut into stages.
    """
    if model_code == "own":
        if model.family == "other":
            kind = (model.hf_config or {}).get("model_type")
            raise _refusal(f"our decoder does not compute what {kind} does", "--set layout.model_code=transformers")
        return decoder.Decoder(model, layers).parts()
    if layers is not None and layers != range(model.n_layers):
        raise _refusal("the code of transformers is not cut into the stages of a pipeline", "--set layout.pp=1")
    from aifactory_train.models.hf import build_foreign

    return build_foreign(model)


def init_weights(weights: Mapping[str, Tensor], model: Model, seed: int) -> None:
    """Fill this rank's part of each weight with random numbers that depend on seed and name alone.

    Families that our decoder has begin with the same numbers in either code.

    Args:
        weights: by name in the root of `build_model`; whole, sharded (DTensor) or stretches (FlatSlice).
    """
    if model.family != "other":
        decoder.init_weights(weights, model, seed)
        return
    from aifactory_train.models.hf import fill_foreign

    fill_foreign(weights, model, seed)


def _refusal(what: str, do: str) -> PlanError:
    error = PlanError(what, where="plan.json: layout.model_code", do=do)
    error.on_every_rank = True  # all ranks read the same plan
    return error
