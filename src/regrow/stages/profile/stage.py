"""The profile stage: it reads text and a checkpoint, and writes statistics and scores."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sequences import VALIDATE_EVERY, Sequences, fit_and_validate
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.families import Family
from regrow.layerwise import Spill
from regrow.profile_folder import INFO, SCORES, SEQUENCES, STATISTICS, Gram, Profile, gram_path
from regrow.runtime import distributed
from regrow.runtime.progress import progress, say
from regrow.stage_dir import Figure, StageDir, require_space, write_json
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.collect import Batch, Collector
from regrow.stages.profile.importance import REMOVALS, score_all, statistics_needed
from regrow.stages.profile.passes import Batches, count_tokens, layer_major, removal_order, resident
from regrow.training.model_check import check_model
from regrow.training.text import text_for

MEANS = ("input_output_distance", "angular_distance")  # means over tokens; the others are sums


def profile(
    model: str | Path | Checkpoint,
    data: DataConfig,
    out: str | Path,
    config: ProfileConfig | None = None,
    options: Options | None = None,
) -> Profile:
    """Measure a checkpoint on the calibration split of `data`; write and return the profile.

    The statistics are those that the criteria need, over `config.samples` sequences. Gram matrices,
    if needed, are computed for the inputs of down_proj (mlp) and o_proj (heads) over the first
    `config.gram_tokens` tokens. Raises UserError for an unknown criterion, an unsupported model
    family, or too little text.
    """
    config, options = (config or ProfileConfig()).resolved(), options or Options()
    options.torch_device()  # raises for a missing device before the slow work
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    family = families.of(checkpoint)
    needs = statistics_needed(config)
    inputs = {"model": checkpoint.fingerprint, "data": data_digest(data)}
    stage = StageDir(Path(out), "profile", config, inputs)
    if stage.complete:
        say(f"profile: {out} is complete and unchanged")
        return Profile(out)
    tokenizer = checkpoint.tokenizer()
    require_space(Path(out), estimate_bytes(checkpoint, config))
    sequences = distributed.from_first(
        lambda: text_for(
            [checkpoint.config], data, tokenizer, "calibration", config.samples, checkpoint
        )
    )
    with stage as folder:
        gram_sequences = min((config.gram_tokens or 0) // data.sequence_length, len(sequences))
        having = [d for d in config.grams if family.layers_of(d, checkpoint.config)]
        grams = having if gram_sequences else []
        weighted = config.token_weight == "inverse_residual"
        sizes = family.sizes(checkpoint.config)
        collector = Collector(family, needs, grams, weighted, sizes["head_dim"])
        _run(checkpoint, sequences, gram_sequences, collector, folder, options)
        sums = distributed.sum_over_ranks(collector.sums)
        statistics = _tidy(sums, sizes, _count(sequences))
        statistics |= _removals(checkpoint, sequences, collector, config, options)
        if "vocab" in needs:
            statistics["token_count/vocab/all"] = distributed.from_first(
                lambda: count_tokens(data, tokenizer, sizes["vocab"], config.vocab_tokens)
            )
        if distributed.is_main():
            about = {
                "digest": stage.digest,  # differs between profiles of one model on different texts
                "grams": grams,
                "gram_tokens": gram_sequences * data.sequence_length,
            }
            _write(checkpoint, family, sequences, statistics, config, folder)
            write_json(folder / INFO, about | _info(checkpoint, sequences, config, data))
        stage.figures.append(
            Figure(name="calibration tokens", value=_count(sequences), unit="tokens")
        )
    return Profile(out)


def _write(
    checkpoint: Checkpoint,
    family: Family,
    sequences: Sequences,
    statistics: dict[str, Tensor],
    config: ProfileConfig,
    folder: Path,
) -> None:
    """Write the statistics, the scores of all criteria, and the text."""

    def gram(dim: str, layer: int) -> Tensor:
        return load_file(gram_path(folder, dim, layer))["fit"]

    save_file(statistics, folder / STATISTICS)
    scores = score_all(config, statistics, _count(sequences), checkpoint, family, gram)
    save_file(scores, folder / SCORES)
    sequences.save(folder / SEQUENCES)


def _info(
    checkpoint: Checkpoint, sequences: Sequences, config: ProfileConfig, data: DataConfig
) -> dict[str, Any]:
    """The model, the text and the criteria of a profile."""
    return {
        "fingerprint": checkpoint.fingerprint,
        "model_type": checkpoint.config["model_type"],
        "criteria": list(config.criteria),
        "samples": len(sequences),
        "tokens": _count(sequences),
        "sequence_length": data.sequence_length,
        "token_weight": config.token_weight,
    }


def estimate_bytes(checkpoint: Checkpoint, config: ProfileConfig) -> int:
    """Bytes of the Gram matrices, which dominate a profile: two float32 [d, d] per reader."""
    dims = config.grams if config.resolved().gram_tokens else ()
    return _gram_bytes(families.of(checkpoint), checkpoint.config, dims)


def _gram_bytes(family: Family, config: dict[str, Any], dims: Iterable[str]) -> int:
    layers = {dim: len(family.layers_of(dim, config)) for dim in dims}
    sizes = family.sizes(config)
    return sum(n * 2 * 4 * families.rows(dim, sizes) ** 2 for dim, n in layers.items() if n)


def _run(
    checkpoint: Checkpoint,
    sequences: Sequences,
    gram_sequences: int,
    collector: Collector,
    folder: Path,
    options: Options,
) -> None:
    device = options.torch_device()
    dtype = checkpoint.compute_dtype(device)
    if distributed.is_main():
        (folder / "grams").mkdir()

    def take_grams(layer: int) -> None:
        for dim, gram in collector.take_grams(layer).items():
            if distributed.is_main():
                _save_gram(gram, gram_path(folder, dim, layer))

    resident_order = options.order == "resident" or (
        options.order == "auto" and all(distributed.gathered(_fits(checkpoint, collector, device)))
    )
    passes = 1 if resident_order else checkpoint.config["num_hidden_layers"]
    if (collector.backward or collector.removals or collector.pairs) and not resident_order:
        raise UserError(
            "criteria with gradients (gradient, taylor, fisher), removals (kl_drop, "
            "perplexity_drop) or pairs of layers (angular_distance) need the whole model on the "
            "device, where it does not fit: leave them out, or give another --device"
        )
    batches = distributed.share(_batches(sequences, gram_sequences, options.batch_size))
    with progress("profile", _count(sequences) * passes) as counter:
        if resident_order:
            resident(checkpoint, batches, collector, take_grams, device, dtype, counter)
            return
        spill = Spill(folder / f"spill-{distributed.rank()}")
        layer_major(checkpoint, batches, collector, take_grams, device, dtype, counter, spill)
        shutil.rmtree(spill.folder)


def _removals(
    checkpoint: Checkpoint,
    sequences: Sequences,
    collector: Collector,
    config: ProfileConfig,
    options: Options,
) -> dict[str, Tensor]:
    if not collector.removals:
        return {}
    device = options.torch_device()
    model = checkpoint.model(checkpoint.compute_dtype(device), device)
    check_model(model)
    some = sequences.select(range(min(config.removal_sequences, len(sequences))))
    batches = list(some.batches(options.batch_size))
    orders = {
        name: removal_order(model, batches, REMOVALS[name]) for name in sorted(collector.removals)
    }
    return {f"{name}/layers/all": order[:, None] for name, order in orders.items()}


def _fits(checkpoint: Checkpoint, collector: Collector, device: torch.device) -> bool:
    """Whether weights and Gram matrices of all layers fit into 70 % of the device's memory."""
    grams = _gram_bytes(collector.family, checkpoint.config, collector.gram_dims)
    weights = sum(checkpoint.bytes(name) for name in checkpoint.names())
    return weights + grams < 0.7 * memory_bytes(device)


def memory_bytes(device: torch.device) -> int:
    """Bytes of memory: free memory on a GPU, memory available to new programs on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _batches(sequences: Sequences, gram_sequences: int, batch_size: int) -> Batches:
    """Batches; each has sequences of one Gram subset, or of neither."""
    if 0 < gram_sequences < VALIDATE_EVERY:
        raise UserError(
            f"{gram_sequences} sequences for the Gram matrices are too few: {VALIDATE_EVERY} or "
            "more are needed; raise samples and gram_tokens, or set gram_tokens to 0"
        )
    return [
        (Batch(batch.pop("real"), subset), batch)
        for subset, batch in fit_and_validate(sequences, gram_sequences, batch_size)
    ]


def _count(sequences: Sequences) -> int:
    return int(sequences.real.sum())


def _save_gram(gram: Gram, path: Path) -> None:
    save_file({"fit": gram.fit, "validate": gram.validate}, path)


def _tidy(sums: dict[str, Tensor], sizes: dict[str, int], tokens: int) -> dict[str, Tensor]:
    """Sums as [units, width] by `statistic/dim/layer`; layers are one tensor; kv_heads are added.

    Sums for expert_mlp are [experts, units].
    """
    tidy: dict[str, Tensor] = {}
    for key, value in sums.items():
        name, dim, layer = key.split("/")
        channels = value.float().cpu()
        if dim == "layers":
            empty = torch.empty(sizes["layers"], len(channels))
            whole = tidy.setdefault(f"{name}/layers/all", empty)
            whole[int(layer)] = channels / (tokens if name in MEANS else 1)
            continue
        units = sizes["experts" if dim == "expert_mlp" else dim]
        tidy[key] = channels.reshape(units, -1).contiguous()
        if dim == "heads":
            tidy[f"{name}/kv_heads/{layer}"] = channels.reshape(sizes["kv_heads"], -1).clone()
    return tidy
