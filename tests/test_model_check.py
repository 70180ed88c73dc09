"""Models whose logits or packed documents are not as we assume are refused when they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_distillation import CONFIG, OPTIONS, data, write_place
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from regrow import plugins
from regrow.errors import UserError
from regrow.stages.distill.stage import distill
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.stage import evaluate
from regrow.training.head import head_of
from regrow.training.model_check import check_model

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 384, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 384, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "falcon": {
        "vocab_size": 384,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "gpt_oss": {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}
LOGITS: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {**SIZES, "lru_width": 32, "num_hidden_layers": 3},
    "xlstm": {"vocab_size": 384, "hidden_size": 32, "num_blocks": 2, "num_heads": 4},
    "falcon_h1": {
        **SIZES,
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
}
OPT = {
    "vocab_size": 384,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def model_of(model_type: str, fields: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", plugins.names("regrow.families"))
def test_every_family_passes_unchanged(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = model(ids).logits
        check_model(model)
        assert torch.equal(model(ids).logits, logits)  # the hook is gone
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", DOCUMENTS)
def test_documents_that_see_each_other_are_refused(model_type: str, dtype: torch.dtype) -> None:
    if model_type == "mamba" and dtype == torch.bfloat16:
        pytest.skip("transformers' slow path of mamba runs in float32 only")
    model = model_of(model_type, DOCUMENTS[model_type], dtype)
    with pytest.raises(UserError, match=f"^{model_type} lets the documents .* not supported$"):
        check_model(model, packed=True)
    check_model(model, packed=False)  # one document in each row


def test_the_second_document_of_a_bloom_row_depends_on_the_first() -> None:
    """By hand: the check refuses what is wrong, not what it does not know."""
    model = model_of("bloom", DOCUMENTS["bloom"], torch.float32)
    ids = torch.arange(16)[None]
    other = torch.cat([ids[:, :8] + 100, ids[:, 8:]], 1)
    with torch.no_grad():
        first, second = (
            model.base_model(tokens).last_hidden_state[0, 8:] for tokens in (ids, other)
        )
    assert float((first - second).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", LOGITS)
def test_other_logits_are_refused(model_type: str, dtype: torch.dtype) -> None:
    model = model_of(model_type, LOGITS[model_type], dtype)
    message = f"^{model_type} transforms its logits in a way that is not supported$"
    for packed in (True, False):
        with pytest.raises(UserError, match=message):
            check_model(model, packed)


def test_a_base_model_that_is_not_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"^opt does not run its base model as a whole"):
        check_model(model_of("opt", OPT, torch.float32))


def test_known_caps_pass_and_other_caps_do_not() -> None:
    """Tiny logits are far below a cap: it shows only because the states are scaled."""
    model = tiny_model("gemma3_text", torch.float32, final_logit_softcapping=30.0)
    check_model(model)
    stock = model.forward

    def doubled_cap(*arguments: Any, **fields: Any) -> Any:
        model.config.final_logit_softcapping = 60.0
        try:
            return stock(*arguments, **fields)
        finally:
            model.config.final_logit_softcapping = 30.0

    model.forward = doubled_cap  # type: ignore[method-assign]
    assert head_of(model).softcap == 30.0
    with pytest.raises(UserError, match="gemma3_text transforms its logits"):
        check_model(model)


def test_weights_that_are_not_finite_are_left_to_the_errors_of_the_stages() -> None:
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.base_model.norm.weight[0] = float("nan")
    check_model(model)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_place(tmp_path_factory.mktemp("check"))
    bloom = folder / "bloom"
    model_of("bloom", DOCUMENTS["bloom"], torch.float32).save_pretrained(bloom)
    tiny_tokenizer().save_pretrained(bloom)
    return folder


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_distill_refuses_both_roles(place: Path, tmp_path: Path, role: str) -> None:
    names = {"student": "pruned", "teacher": "teacher", role: "bloom"}
    folders = (place / names["student"], place / names["teacher"])
    with pytest.raises(UserError, match="bloom lets the documents"):
        distill(*folders, data(place), tmp_path / "out", CONFIG, OPTIONS)


def test_evaluate_refuses_packed_text_only(place: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A few words that are enough for a window. " * 4)
    config = EvaluateConfig(
        metrics=("perplexity",), texts={"own": str(tmp_path / "text.txt")}, window=32
    )
    models = {"bloom": place / "bloom"}
    evaluate(models, tmp_path / "own", None, config=config, options=OPTIONS)
    with pytest.raises(UserError, match="bloom lets the documents"):
        evaluate(models, tmp_path / "packed", data(place), config=config, options=OPTIONS)
