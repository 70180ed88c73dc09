"""Lottery tickets: random models from a seed, rewinding, random tickets, and the example recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_folders import data_of, write_model, write_text
from tiny_job import recipe_fields, refused, write_recipe

from regrow import (
    DistillConfig,
    InitializeConfig,
    Options,
    SparsifyConfig,
    UserError,
    distill,
    initialize,
    sparsify,
    stage_dir,
)
from regrow.checkpoint import Checkpoint, load
from regrow.cli.main import main
from regrow.config import parse
from regrow.sparsity import zeros
from regrow.sparsity.pattern import Sparsity
from regrow.sparsity.pattern import parse as parse_pattern
from regrow.stages.sparsify.methods import random

EXAMPLE = Path(__file__).parents[1] / "examples" / "lottery_ticket.yaml"
CROSS_ENTROPY = DistillConfig(
    tokens=1024,
    batch_tokens=128,
    learning_rate=1e-2,
    eval_tokens=256,
    heldout_sequences=4,
    losses={"cross_entropy": 1.0},
    chosen_by="cross_entropy",
)
OPTIONS = Options(device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose config the random ones have, text, a random model and the same one trained."""
    place = tmp_path_factory.mktemp("lottery")
    write_text(place / "text.jsonl")
    write_model(place / "model", num_hidden_layers=2)
    initialize(place / "model", place / "first", InitializeConfig(seed=3))
    distill(
        place / "first",
        place / "first",
        data_of(place / "text.jsonl"),
        place / "trained",
        CROSS_ENTROPY,
        OPTIONS,
    )
    return place


def test_a_random_model_is_that_of_its_class_and_seed(place: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_hidden_layers": 3, "intermediate_size": 24}
    out = initialize(place / "model", tmp_path / "out", InitializeConfig(seed=7, sizes=sizes))
    config = AutoConfig.from_pretrained(place / "model", **sizes)
    torch.manual_seed(7)
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    found = load(out)
    assert found.config["num_hidden_layers"] == 3
    assert all(torch.equal(found.tensor(n), expected[n]) for n in found.names())
    again = initialize(place / "model", tmp_path / "again", InitializeConfig(seed=8, sizes=sizes))
    name = "model.layers.2.mlp.up_proj.weight"
    assert not torch.equal(load(again).tensor(name), expected[name])
    assert found.tokenizer().get_vocab() == load(place / "model").tokenizer().get_vocab()


def test_a_student_that_learns_the_text_alone(place: Path) -> None:
    """The checkpoint is chosen by the text's loss, and the teacher is never run."""
    rows = [json.loads(line) for line in (place / "trained/metrics.jsonl").read_text().splitlines()]
    heldout = [row["heldout_cross_entropy"] for row in rows if "heldout_cross_entropy" in row]
    assert heldout[-1] < 0.95 * heldout[0]
    assert not any("forward_kl" in key or "heldout_kl" in key for row in rows for key in row)
    found = {f["name"]: f["value"] for f in (stage_dir.read(place / "trained") or {})["figures"]}
    assert found["held-out cross-entropy"] == min(heldout)
    with pytest.raises(
        UserError, match="chosen_by cross_entropy: it must be last, or one of the losses"
    ):
        parse(DistillConfig, {"chosen_by": "cross_entropy"}, "distill")


@pytest.mark.parametrize("fields", [{"sparsity": 0.6}, {"pattern": "2:4"}], ids=str)
def test_a_winning_ticket(fields: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """The mask is that of the trained weights, and all values are those of the first model."""
    config = SparsifyConfig(method="magnitude", rewind_to=str(place / "first"), **fields)
    ticket = load(sparsify(place / "trained", tmp_path / "out", config))
    trained, first = load(place / "trained"), load(place / "first")
    for name, weight in zeros.weights(ticket):
        size = trained.tensor(name).double().abs()
        if "pattern" in fields:
            lowest = size.view(-1, 4).argsort(1)[:, :2]
            mask = torch.zeros_like(size, dtype=torch.bool).view(-1, 4)
            mask = mask.scatter(1, lowest, True).view_as(size)
        else:
            order = size.flatten().argsort()[: round(0.6 * size.numel())]
            mask = torch.zeros(size.numel(), dtype=torch.bool)
            mask[order] = True
            mask = mask.view_as(size)
        assert torch.equal(weight, first.tensor(name).masked_fill(mask, 0)), name
    others = set(ticket.names()) - {name for name, _ in zeros.weights(ticket)}
    assert others
    for name in others:
        assert torch.equal(ticket.tensor(name), first.tensor(name)), name
    assert not torch.equal(
        trained.tensor("model.embed_tokens.weight"), first.tensor("model.embed_tokens.weight")
    )


def test_rounds_keep_the_zeros_of_the_rounds_before(place: Path, tmp_path: Path) -> None:
    first, text = str(place / "first"), data_of(place / "text.jsonl")
    start: Path = place / "trained"
    masks: list[dict[str, torch.Tensor]] = []
    for number, share in enumerate((0.5, 0.75)):
        config = SparsifyConfig(method="magnitude", sparsity=share, rewind_to=first)
        ticket = sparsify(start, tmp_path / f"ticket-{number}", config)
        masks.append({name: weight == 0 for name, weight in zeros.weights(load(ticket))})
        out = tmp_path / f"trained-{number}"
        start = distill(ticket, place / "first", text, out, CROSS_ENTROPY, OPTIONS)
        for name, weight in zeros.weights(load(start)):
            assert torch.equal(weight == 0, masks[-1][name]), name
    for name, mask in masks[0].items():
        assert (masks[1][name] | ~mask).all(), name
        assert float(masks[1][name].float().mean()) == pytest.approx(0.75, abs=0.01)


def test_a_module_that_a_later_round_keeps_has_its_first_zeros(place: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"method": "magnitude", "rewind_to": str(place / "first")}
    first = SparsifyConfig.model_validate({**fields, "sparsity": 0.5})
    ticket = sparsify(place / "trained", tmp_path / "first", first)
    second = SparsifyConfig.model_validate({**fields, "sparsity": 0.75, "keep": ["v_proj"]})
    again = load(sparsify(ticket, tmp_path / "second", second))
    for name, weight in zeros.weights(load(ticket)):
        assert (again.tensor(name)[weight == 0] == 0).all(), name
        expected = 0.5 if "v_proj" in name else 0.75
        assert zeros.share(again.tensor(name)) == pytest.approx(expected, abs=0.01)


def test_a_ticket_has_the_dtype_of_the_model_and_not_of_the_earlier_one(
    place: Path, tmp_path: Path
) -> None:
    early = load(place / "first").model(torch.float32)
    early.save_pretrained(tmp_path / "early")
    half = early.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((place / "first" / name).read_bytes())
    config = SparsifyConfig(method="magnitude", rewind_to=str(tmp_path / "early"))
    ticket = load(sparsify(tmp_path / "model", tmp_path / "out", config))
    assert {ticket.dtype(name) for name in ticket.names()} == {"bfloat16"}


@pytest.mark.parametrize("target", [Sparsity(0.7), parse_pattern("2:4")], ids=str)
def test_random_zeros(target: Sparsity) -> None:
    """The number is exact, the places are even over the matrix, and earlier zeros count."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight[:, ::4] = 0
    drawn = [
        random.sparsify(weight, target, draw=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for each in drawn:
        assert zeros.share(each) == pytest.approx(target.share, abs=1e-4)
        assert (each[:, ::4] == 0).all()
        assert torch.equal(each[each != 0], weight[each != 0])
    by_column = (drawn[0] == 0).float().mean(0).view(-1, 4)[:, 1:].mean(0)
    expected = (target.share - 0.25) / 0.75
    assert by_column.tolist() == pytest.approx([expected] * 3, abs=0.04)


def test_a_random_ticket_differs_by_seed_and_by_module(place: Path, tmp_path: Path) -> None:
    made = {}
    for seed in (0, 1):
        fields = {"method": "random", "sparsity": 0.5, "rewind_to": str(place / "first")}
        config = SparsifyConfig.model_validate({**fields, "seed": seed})
        made[seed] = load(sparsify(place / "trained", tmp_path / str(seed), config))
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    masks = [made[seed].tensor(name) == 0 for seed in (0, 1) for name in names]
    for number, mask in enumerate(masks):
        for other in masks[:number]:
            assert 0.35 < float((mask == other).float().mean()) < 0.65


REFUSED = {
    "another shape": (
        {"intermediate_size": 40},
        "model.layers.0.mlp.down_proj.weight is [48, 40] there and [48, 48]",
    ),
    "fewer layers": (
        {"num_hidden_layers": 1},
        "model.layers.1.input_layernorm.weight is missing there",
    ),
    "a head of its own": (
        {"tie_word_embeddings": False},
        "lm_head.weight is [384, 48] there and missing in",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rewinding_to_another_model_is_refused(
    case: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes, message = REFUSED[case]
    fields = {"num_hidden_layers": 2, "intermediate_size": 48, "hidden_size": 48}
    fields |= {"tie_word_embeddings": True, **sizes}
    own = {"num_hidden_layers": 2, "intermediate_size": 48, "tie_word_embeddings": True}
    write_model(tmp_path / "model", **{**fields, **own})
    write_model(tmp_path / "early", **fields)
    out = tmp_path / "out"
    arguments = ["sparsify", tmp_path / "model", "--method", "magnitude", "--out", out]
    told = refused(capsys, *arguments, "--rewind-to", tmp_path / "early")
    assert message in told
    assert "give an earlier checkpoint of that model" in told
    assert not out.exists()


def test_the_command_refuses_sizes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base = ["initialize", place / "model", "--out", out, "--sizes"]
    assert "did you mean 'hidden_size'" in refused(capsys, *base, "hiden_size", 32)
    assert "vocab_size 4 is too small" in refused(capsys, *base, "vocab_size", 4)
    assert "num_hidden_layers 0 is no size" in refused(capsys, *base, "num_hidden_layers", 0)
    assert not out.exists()
    assert main([*map(str, base), "num_hidden_layers", "1", "--seed", "2", "--dry-run"]) == 0
    assert "random weights, seed 2" in capsys.readouterr().out


def test_a_recipe_refuses_a_stage_that_is_not_there(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"sparsify": {"method": "magnitude", "rewind_to": "03-initialize"}}, "initialize"]
    fields = recipe_fields(place / "model", place / "text.jsonl", *stages)
    recipe = write_recipe(tmp_path / "recipe.yaml", fields)
    told = refused(capsys, "run", recipe, "--out", tmp_path / "run")
    assert "rewind_to 03-initialize: give an earlier stage that writes a model" in told


SIZES: dict[str, tuple[list[Any], str]] = {
    "another width by then": (
        [
            "initialize",
            "profile",
            {"prune": {"intermediate_size": 32, "repair": False}},
            {"sparsify": {"method": "magnitude", "rewind_to": "01-initialize"}},
        ],
        "model.layers.0.mlp.down_proj.weight is [48, 56] there and [48, 32]",
    ),
    "no such layer by then": (
        [
            {"initialize": {"sizes": {"num_hidden_layers": 1}}},
            {"sparsify": {"method": "magnitude", "keep": ["layers\\.1\\."]}},
        ],
        "matches no module",
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_recipe_knows_the_sizes_at_each_stage(
    case: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages, message = SIZES[case]
    fields = recipe_fields(place / "model", place / "text.jsonl", *stages)
    recipe = write_recipe(tmp_path / "recipe.yaml", fields)
    assert message in refused(capsys, "run", recipe, "--out", tmp_path / "run", "--dry-run")


def test_a_recipe_accepts_what_fits_the_sizes_by_then(place: Path, tmp_path: Path) -> None:
    three = {"sizes": {"num_hidden_layers": 3}}
    config = InitializeConfig.model_validate(three)
    early = initialize(place / "model", tmp_path / "early", config)
    layer = {"method": "magnitude", "keep": ["layers\\.2\\."]}
    stages = [
        {"initialize": three},
        {"sparsify": {**layer, "rewind_to": str(early)}},
        {"learn_masks": {"num_layers": 2, "train_weights": False, "batch_tokens": 128}},
    ]
    fields = recipe_fields(place / "model", place / "text.jsonl", *stages)
    recipe = write_recipe(tmp_path / "recipe.yaml", fields)
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), "--dry-run"]) == 0


def test_the_example_runs(place: Path, tmp_path: Path) -> None:
    """The recipe in examples/, on a tiny model and with few tokens."""
    fields = yaml.safe_load(EXAMPLE.read_text())
    tiny = recipe_fields(place / "model", place / "text.jsonl")
    fields = {**fields, "model": tiny["model"], "data": tiny["data"]}
    few = {"tokens": 256, "batch_tokens": 128, "eval_tokens": 128, "heldout_sequences": 2}
    for entry in fields["stages"]:
        (name,) = entry
        if name == "distill":
            entry[name].update(few)
        if name == "evaluate":
            entry[name].update({"metrics": ["size", "perplexity"], "heldout_sequences": 2})
        if name == "initialize":
            entry[name].pop("sizes", None)
    recipe = write_recipe(tmp_path / "recipe.yaml", fields)
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 0
    folders = sorted(path.name for path in (tmp_path / "run/stages").iterdir())
    tickets = [name for name in folders if name.endswith("sparsify")]
    first, shares = load(tmp_path / "run/stages/01-initialize"), []
    for name in tickets:
        ticket = Checkpoint(tmp_path / "run/stages" / name)
        shares.append(0.0)
        for tensor, weight in zeros.weights(ticket):
            assert torch.equal(weight[weight != 0], first.tensor(tensor)[weight != 0])
            shares[-1] = zeros.share(weight)
    assert shares == sorted(shares)
    assert shares[-1] > 0.7
