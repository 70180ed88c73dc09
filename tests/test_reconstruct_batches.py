"""The batches, dtypes and memory of a reconstruction, which change a result by rounding at most."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
from pretend_cuda import FakeCuda
from pretend_streams import FakeStreams
from safetensors.torch import load_file
from tiny_folders import data_of, write_model, write_text
from tiny_job import LENGTH, PROFILE, PRUNE, Refused, recipe_fields, write_recipe
from tiny_models import random_plan
from torch import Tensor

from regrow import UserError
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.layerwise import LayerByLayer
from regrow.pruning.config import PruneConfig
from regrow.runtime import prefetch
from regrow.stage_dir import read
from regrow.stages.prune.stage import prune
from regrow.stages.reconstruct import ReconstructConfig, stage, streams
from regrow.stages.reconstruct.stage import Reconstruction, reconstruct
from regrow.stages.reconstruct.train_layer import relative_error

OPTIONS = Options(device="cpu", batch_size=4)
CONFIG = ReconstructConfig(
    tokens=8 * LENGTH, batch_tokens=4 * LENGTH, passes=2, validation_sequences=6, checks=3
)
LAYERS = 3


class Place(NamedTuple):
    """A teacher, a student that was cut from it, and text."""

    teacher: Checkpoint
    student: Checkpoint
    text: Path

    def work(self, folder: Path, options: Options = OPTIONS, spills: bool = False) -> Any:
        """A reconstruction that has not begun."""
        plan = stage.plan_between(self.student, self.teacher)
        text = stage._text(data_of(self.text), self.student, CONFIG)
        folder.mkdir()
        both = (self.student, self.teacher)
        return Reconstruction(*both, plan, text, CONFIG, options, folder, spills)

    def reconstruct(self, out: Path, config: ReconstructConfig, options: Options = OPTIONS) -> Path:
        data = data_of(self.text)
        return reconstruct(self.student.folder, self.teacher.folder, data, out, config, options)


def write_place(folder: Path, dtype: torch.dtype) -> Place:
    """Random weights; the student keeps random channels of MLPs and of the residual stream."""
    teacher = write_model(folder / "teacher", dtype=dtype, num_hidden_layers=LAYERS)
    plan = random_plan(teacher.config, teacher.fingerprint, mlp=32, hidden=36)
    plan.write(folder / "plan.json")
    prune(teacher, folder / "cut", PruneConfig(plan=str(folder / "plan.json"), repair=False))
    text = write_text(folder / "text.jsonl", documents=400)
    return Place(teacher, Checkpoint(folder / "cut"), text)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return write_place(tmp_path_factory.mktemp("place"), torch.float32)


def measured(work: Any, layer: int = 1) -> tuple[float, float]:
    """The model's KL to its teacher, and the error of a layer on the validation text."""
    both_streams = streams.Streams(work._streams, work._batches(), work._dense, work._cut)
    both_streams.advance_dense(range(layer + 1), work.ids_V)
    for before in range(layer):
        both_streams.advance_cut(before)
    return work._kl(), work._error(layer, both_streams, work._target(both_streams))


@pytest.mark.usefixtures("alone")
def test_larger_validation_batches_give_the_same_values(
    both: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As batches of one sequence, whose numbers of tokens differ."""
    found = {}
    for tokens in (1, 4 * LENGTH, stage.VALIDATION_TOKENS):
        monkeypatch.setattr(stage, "VALIDATION_TOKENS", tokens)
        work = both.work(tmp_path / str(tokens))
        found[len(work.validation)] = measured(work)
    assert list(found) == [6, 2, 1]
    reals = [int(n) for n in work.validation[0]["real"].sum(-1)]
    assert min(reals) < max(reals)
    for kl, error in found.values():
        assert kl == pytest.approx(found[6][0], rel=1e-5)
        assert error == pytest.approx(found[6][1], rel=1e-5)


@pytest.mark.parametrize(("tokens", "batches"), [(stage.VALIDATION_TOKENS, 1), (2 * LENGTH, 3)])
def test_a_check_reads_each_layer_once_for_each_batch(
    tokens: int, batches: int, both: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "VALIDATION_TOKENS", tokens)
    work = both.work(tmp_path / "work")
    filled, fill = list[int](), LayerByLayer._fill

    def counted(shell: LayerByLayer, layer: int, *rest: Any) -> None:
        filled.append(layer)
        fill(shell, layer, *rest)

    monkeypatch.setattr(LayerByLayer, "_fill", counted)
    work._kl()
    assert filled == [*range(LAYERS)] * batches


@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own parts
def test_compiled_layers_give_the_same_weights(both: Place, tmp_path: Path) -> None:
    """Layers of one kind share a graph, in float32, where fused products round alike."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain = both.reconstruct(tmp_path / "plain", CONFIG)
    assert counters["stats"]["unique_graphs"] == 0
    options = OPTIONS.model_copy(update={"torch_compile": True})
    compiled = both.reconstruct(tmp_path / "compiled", CONFIG, options)
    assert 0 < counters["stats"]["unique_graphs"] < LAYERS
    old, new = (load_file(folder / "model.safetensors") for folder in (plain, compiled))
    before = load_file(both.student.folder / "model.safetensors")
    for name, tensor in old.items():
        moved = (tensor - before[name]).norm()
        assert (new[name] - tensor).norm() <= 0.02 * moved, name
    assert not all(torch.equal(old[name], before[name]) for name in old)


def test_a_missing_compiler_is_refused(
    both: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    options = OPTIONS.model_copy(update={"torch_compile": True})
    with pytest.raises(UserError, match=r"torch_compile needs a C\+\+ compiler"):
        both.reconstruct(tmp_path / "out", CONFIG, options)


def test_the_figures_count_sequences(both: Place, tmp_path: Path) -> None:
    assert both.work(tmp_path / "work").validation[0]["real"].shape[0] == 6
    manifest = read(both.reconstruct(tmp_path / "out", CONFIG))
    assert manifest is not None
    assert manifest["figures"][0]["convention"].startswith("6 validation sequences")


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_the_streams_stay_in_the_memory_of_the_host(
    both: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU has one batch of them, reads the next layer meanwhile, and finds the same values."""
    expected = measured(both.work(tmp_path / "cpu"))
    with FakeCuda() as fake, FakeStreams(0, at_once=True).install(monkeypatch) as copied:
        monkeypatch.setattr(torch.cuda, "device", lambda *_: torch.no_grad())
        monkeypatch.setattr(prefetch, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
        work = both.work(tmp_path / "cuda", Options(device="cuda", batch_size=4))
        kept = streams.Streams(work._streams, work._batches(), work._dense, work._cut)
        kept.advance_dense(range(2), work.ids_V)
        kept.advance_cut(0)
        batches = range(len(work._batches()))
        given = [kept.dense(n) for n in batches] + [kept.cut_input(n) for n in batches]
        assert not any(map(fake.is_there, given))
        target = work._target(kept)
        assert fake.is_there(target.weight_H)
        assert fake.is_there(target.stream(0))
        copies, allocated, threads = copied.copies, fake.allocated(), threading.enumerate()
        kl = work._kl()
        assert copied.copies > copies + LAYERS  # the layers, and what was read ahead
        assert fake.allocated() <= allocated
        assert threading.enumerate() == threads
        error = work._error(1, kept, target)
    assert (kl, error) == pytest.approx(expected, rel=1e-5)


def test_streams_that_go_to_disk_need_space_there(
    both: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = list[int]()
    monkeypatch.setattr(stage, "require_space", lambda _, size: needed.append(size))
    in_memory = both.reconstruct(tmp_path / "memory", CONFIG)
    monkeypatch.setattr(streams, "SHARE_OF_RAM", 0.0)
    on_disk = both.reconstruct(tmp_path / "disk", CONFIG)
    widths = [model.config["hidden_size"] for model in (both.teacher, both.student)]
    assert needed[1] - needed[0] == (8 + 6) * LENGTH * sum(widths) * 4
    one, other = (load_file(folder / "model.safetensors") for folder in (in_memory, on_disk))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_has_whole_sequences(both: Place, tmp_path: Path, refused: Refused) -> None:
    """A batch_tokens that was given; the default follows the sequence length."""
    for length, sequences in ((LENGTH, 16), (384, 1), (512, 1), (1024, 1)):
        assert ReconstructConfig().sequences_in_step(length) == sequences
    odd = CONFIG.model_copy(update={"batch_tokens": 100})
    with pytest.raises(UserError, match=f"^batch_tokens 100 is no multiple of .* {LENGTH}: "):
        both.reconstruct(tmp_path / "out", odd)
    assert not list(tmp_path.iterdir())  # before any work
    fields = recipe_fields(both.teacher.folder, both.text, PROFILE, PRUNE)
    fields["stages"].append({"reconstruct": {"batch_tokens": 100}})
    recipe = write_recipe(tmp_path / "recipe.yaml", fields)
    assert "batch_tokens 100 is no multiple" in refused("run", recipe, "--out", tmp_path / "x")
    call = ["reconstruct", both.student.folder, "--teacher", both.teacher.folder]
    text = ["--data", both.text, "--sequence-length", LENGTH, "--batch-tokens", 100]
    said = refused(*call, *text, "--out", tmp_path / "x", "--dry-run")
    assert said.endswith("32: change one of them, or leave batch_tokens out")


@pytest.mark.usefixtures("alone")
def test_smaller_batches_make_the_same_step(both: Place, tmp_path: Path) -> None:
    """One of four sequences, whose numbers of tokens differ."""
    weights, sizes = {}, {}
    for size in (1, 3, 4):
        options = OPTIONS.model_copy(update={"batch_size": size})
        work = both.work(tmp_path / f"work{size}", options)
        sizes[size] = [len(batch["real"]) for batch in work.train]
        work.run()
        weights[size] = {name: work.current(name) for name in both.student.names()}
        assert all(row["kept"] for row in work.rows)
    assert sizes == {1: [1] * 8, 3: [3, 1, 3, 1], 4: [4, 4]}
    for name, whole in weights[4].items():
        for size in (1, 3):
            torch.testing.assert_close(weights[size][name], whole, rtol=1e-4, atol=1e-5)
    moved = [(weights[4][name] - both.student.tensor(name)).abs().max() for name in weights[4]]
    assert max(moved) > 1e-3


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return write_place(tmp_path_factory.mktemp("halves"), torch.float16)


def test_float16_weights_keep_all_of_their_digits(
    halves: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are trained in float32, from what is stored, and rounded once."""
    errors = iter([1.0, 0.0] * LAYERS)
    monkeypatch.setattr(stage, "relative_error", lambda *_: next(errors))
    monkeypatch.setattr(Reconstruction, "_kl", lambda work, **_: -len(work.kl))
    still = CONFIG.model_copy(update={"learning_rate": 1e-12})
    out = halves.reconstruct(tmp_path / "out", still)
    manifest = read(out)
    assert manifest is not None
    assert all(row["kept"] for row in manifest["layers"])
    old, new = (load_file(folder / "model.safetensors") for folder in (halves.student.folder, out))
    for name, value in old.items():
        assert new[name].dtype == torch.float16
        assert torch.equal(new[name], value), name


def test_the_error_is_that_of_the_weights_as_they_are_stored(
    halves: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded to float16, and then to bfloat16, in which the layer runs."""
    seen = list[dict[str, Tensor]]()

    def noted(model: LayerByLayer, *rest: Any) -> float:
        layer = len(seen) // 2
        weights = model.layers[layer].named_parameters(f"model.layers.{layer}")
        seen.append({name: value.detach().clone() for name, value in weights})
        relative_error(model, *rest)
        return [1.0, 0.0][(len(seen) - 1) % 2]

    monkeypatch.setattr(stage, "relative_error", noted)
    monkeypatch.setattr(Reconstruction, "_kl", lambda work, **_: -len(work.kl))
    stored = load_file(halves.reconstruct(tmp_path / "out", CONFIG) / "model.safetensors")
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        for name, value in after.items():
            assert torch.equal(value, stored[name].bfloat16()), name
        assert any(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize(
    ("size", "advice"),
    [
        (4, "lower --batch-size, as a batch had 4 sequences; the same command then continues"),
        (1, "with a single sequence in a batch: lower the sequence_length"),
    ],
)
def test_too_little_memory_is_one_line(
    size: int, advice: str, both: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And smaller batches continue with the layer that the run was at."""
    trained = list[int]()
    train: Any = stage.train_layer

    def short(*given: Any, seed: int, **rest: Any) -> Any:
        trained.append(seed)
        if len(trained) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return train(*given, seed=seed, **rest)

    monkeypatch.setattr(stage, "train_layer", short)
    out, options = tmp_path / "out", OPTIONS.model_copy(update={"batch_size": size})
    with pytest.raises(UserError, match=f"^memory ran out.*{advice}") as raised:
        both.reconstruct(out, CONFIG, options)
    assert "\n" not in str(raised.value)
    both.reconstruct(out, CONFIG, OPTIONS.model_copy(update={"batch_size": 2}))
    assert trained == [0, 1, 1, 2]
    with pytest.raises(RuntimeError, match="shapes"), stage._memory_errors(4):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
