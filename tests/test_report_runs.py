"""Several runs and evaluations on one page; quality against cost, benchmarks, and what it cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_run import (
    STUDENT,
    TEACHER,
    add_benchmarks,
    write_evaluation,
    write_json,
    write_manifest,
    write_metrics,
    write_run,
)
from test_report import HOSTILE, Page, loads

from regrow.cli.main import main
from regrow.errors import UserError
from regrow.stages.report import ReportConfig
from regrow.stages.report import run_folder as folders
from regrow.stages.report.charts import clip, places
from regrow.stages.report.evaluated import Evaluated, of
from regrow.stages.report.numbers import figure
from regrow.stages.report.page import Chart, Details, Section, Table
from regrow.stages.report.sections import cost, result, tasks, tradeoff, training
from regrow.stages.report.sections.cost import costs_of, flops, watt_hours
from regrow.stages.report.stage import report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one teacher; the second student is better and smaller."""
    place = tmp_path_factory.mktemp("runs")
    folders_written = [write_run(place / name) for name in ("first", "second")]
    for folder in folders_written:
        add_benchmarks(folder)
    change(
        folders_written[1],
        "distilled",
        {"perplexity/heldout": 40.0, "bytes": 1e8, "parameters": 5e7},
    )
    return folders_written


def change(run: Path, label: str, values: dict[str, float]) -> None:
    path = run / "stages" / "04-evaluate" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for row in evaluation["figures"][label]:
        row["value"] = values.get(row["name"], row["value"])
    write_json(path, evaluation)


def change_inputs(run: Path, **inputs: str) -> None:
    path = run / "stages" / "04-evaluate" / "manifest.json"
    manifest = json.loads(path.read_text())
    write_json(path, {**manifest, "inputs": {**manifest["inputs"], **inputs}})


def evaluated(*runs: Path) -> Evaluated:
    combined = of(folders.gather(list(runs), []))
    assert combined is not None
    return combined


def tables(section: Section | None) -> list[list[list[str]]]:
    assert section is not None
    found_tables = [block for block in section.blocks if isinstance(block, Table)]
    return [
        [table.head, *([cell.text for cell in row] for row in table.rows)] for table in found_tables
    ]


def charts_of(section: Section | None) -> list[Chart]:
    assert section is not None
    return [block for block in section.blocks if isinstance(block, Chart)]


# Several runs


def test_two_runs_on_one_page(runs: list[Path], tmp_path: Path) -> None:
    page = Page(report(runs, tmp_path / "page.html").read_text())
    assert page.ids == [
        *("result", "tradeoff", "tasks", "speed", "generations", "training", "kept", "cost"),
        *("conventions", "provenance"),
    ]
    assert "first · distilled: 80.9% of the parameters, perplexity (heldout) 42" in page.words
    assert "second · distilled: 37.2% of the parameters, perplexity (heldout) 40" in page.words
    assert loads(page) == []
    names = [trace["name"] for trace in page.figures["training-1"]["data"]]
    assert names == [
        *("first: loss, running mean", "first: held-out KL"),
        *("second: loss, running mean", "second: held-out KL"),
    ]
    assert "first · 02-prune" in page.words and "second · 02-prune" in page.words


def test_a_row_per_run_and_model(runs: list[Path]) -> None:
    section = result.section(folders.gather(runs, []))
    ((head, *rows),) = tables(section)
    assert [row[0] for row in rows] == [
        f"{run} · {label}"
        for run in ("first", "second")
        for label in ("teacher", "pruned", "repaired", "distilled")
    ]
    assert section is not None and isinstance(section.blocks[0], Table)
    assert section.blocks[0].marked == {3, 7}
    at = head.index("perplexity, heldout")
    assert [row[at] for row in rows[-2:]] == ["47.00", "40.00"]
    assert "Measured differently" not in section.note


def test_run_names_are_the_shortest_distinct_paths(tmp_path: Path) -> None:
    places = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for place in places:
        write_run(place)
    assert [run.name for run in folders.gather(places, [])] == ["a/run", "b/run"]
    assert [run.name for run in folders.gather(places[:1], [])] == [""]
    with pytest.raises(UserError, match="a run is given twice"):
        folders.gather([places[0], places[0] / ".." / "run"], [])


def test_figures_measured_differently_are_marked(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    combined = evaluated(*runs)
    assert not any(combined.unlike(name) for name in combined.names)
    change_inputs(runs[1], data="c" * 64, **{"model teacher": "9" * 64})
    combined = evaluated(*runs)
    assert combined.unlike("perplexity/heldout") == "text"
    assert combined.unlike("perplexity/wikitext2") == ""
    assert combined.unlike("kl/heldout") == "text, teacher"
    assert combined.unlike("kl/wikitext2") == "teacher"
    path = runs[1] / "stages" / "04-evaluate" / "evaluation.json"
    path.write_text(path.read_text().replace("windows of 512", "windows of 1024"))
    assert evaluated(*runs).unlike("perplexity/wikitext2") == "convention"
    section = result.section(folders.gather(runs, []))
    assert section is not None
    assert "do not compare across runs: perplexity, heldout (different text, conv" in section.note
    # What is alike is drawn first; with none alike it is said on the axis.
    axis = charts_of(tradeoff.section(folders.gather(runs, [])))[0].figure["layout"]["yaxis"]
    assert axis["title"]["text"] == "perplexity, heldout (different text, convention by run)"


def test_another_evaluation_is_compared_with_a_run(runs: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_evaluation(other, ["dense", "theirs"], "Hi", "there")
    path = other / "evaluation.json"
    path.write_text(path.read_text().replace("61.0", "55.0"))
    write_manifest(other, "evaluate")
    config = ReportConfig(compare=(f"theirs={other}",))
    page = Page(report(runs[0], tmp_path / "page.html", config).read_text())
    assert page.ids[:3] == ["result", "tradeoff", "tasks"] and "importance" in page.ids
    assert "theirs · theirs" in page.words and "theirs · 01-profile" not in page.words
    points = page.figures["tradeoff-1"]["data"]
    assert [trace["name"] for trace in points] == ["Pareto front", "this run", "theirs"]
    assert (points[2]["x"], points[2]["y"]) == ([217.6], [55.0])  # dense is where the teacher is
    assert points[1]["text"][0] == "teacher, dense"
    assert page.figures["quality-1"]["data"][0]["x"] == [
        "teacher", "pruned", "repaired", "distilled",
    ]  # fmt: skip


def test_bad_input_is_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized = tmp_path / "quantized"
    write_manifest(quantized, "quantize")
    (tmp_path / "empty").mkdir()

    def refused(*arguments: object) -> str:
        assert main(["report", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "2 runs on one page: give --out the name of an HTML file" in refused(*runs)
    assert "2 runs on one page" in refused(*runs, "--dry-run")
    page = ["--out", tmp_path / "page.html"]
    assert "empty has no run" in refused(runs[0], tmp_path / "empty", *page)
    assert "given twice" in refused(runs[0], runs[0], *page)
    assert "no such folder to compare with: nowhere" in refused(runs[0], "--compare", "nowhere")
    assert "has no evaluation.json: run regrow evaluate" in refused(
        runs[0], "--compare", quantized, *page
    )
    assert not (tmp_path / "page.html").exists()


def test_hostile_text_of_several_runs_stays_text(tmp_path: Path) -> None:
    labels = tuple(f"{HOSTILE}{n}" for n in range(4))
    places = [tmp_path / f"<script>x{n}" for n in range(2)]
    for place in places:
        write_run(place, labels, HOSTILE)
        add_benchmarks(place)
        path = place / "stages" / "04-evaluate" / "evaluation.json"
        path.write_text(path.read_text().replace("arc_easy", json.dumps(HOSTILE)[1:-1]))
        write_metrics(
            place / "metrics.jsonl", "03-distill", feature_losses={HOSTILE: 1.0, "a": 2.0}
        )
        manifest = {"config": {"scheme": HOSTILE}, "figures": [{"name": HOSTILE, "value": 1.0}]}
        write_manifest(place / "stages" / "03-distill", "quantize", **manifest)
    for run in (places, places[0]):
        page = Page(report(run, tmp_path / "page.html", ReportConfig(title=HOSTILE)).read_text())
        assert not {"img", "b", "iframe"} & {tag for tag, _ in page.tags}
        assert len([a for a, _ in page.scripts if "type" not in a]) == 2
        assert loads(page) == []
        raw = [text for a, text in page.scripts if "type" in a]
        assert not [text for text in raw if "<" in text or "&" in text]
        shown = [t for f in page.figures.values() for trace in f["data"] for t in labels_in(trace)]
        assert shown and not [text for text in shown if "<" in text]


def labels_in(trace: dict[str, Any]) -> list[str]:
    """Whatever plotly would take for markup."""
    labels = [trace.get("name", ""), *trace.get("text", [])]
    labels += [cell for row in trace.get("customdata", []) for cell in row]
    return [
        text
        for text in (*labels, *trace.get("x", []), *trace.get("y", []))
        if isinstance(text, str)
    ]


def test_notes_of_an_evaluation_stand_above_its_figures(runs: list[Path]) -> None:
    path = runs[1] / "stages" / "04-evaluate" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    write_json(path, {**evaluation, "notes": ["the KL of distilled is over its own tokens."]})
    section = result.section(folders.gather(runs, []))
    assert section is not None
    assert "second · The KL of distilled is over its own tokens." in section.note
    assert "first ·" not in section.note


# Quality against size and speed


def test_points_and_their_front(runs: list[Path]) -> None:
    section = tradeoff.section(folders.gather(runs[:1], []))
    charts = charts_of(section)
    axes = [
        tuple(chart.figure["layout"][a]["title"]["text"] for a in ("xaxis", "yaxis"))
        for chart in charts
    ]
    costs = ("size of the weights, MB", "reading prompts, tokens/s", "generating, tokens/s")
    qualities = ("perplexity, heldout", "mean score of 4 tasks")
    assert axes == [(x, y) for y in qualities for x in costs]
    line, points = charts[0].figure["data"]
    assert points["x"] == pytest.approx([269.030016, 217.6, 217.6, 217.6])
    assert points["y"] == [28.5, 61.0, 47.0, 42.0]
    assert points["text"] == ["teacher", "pruned", "repaired", "distilled"]
    assert points["marker"]["symbol"] == ["square", "circle", "circle", "diamond"]
    assert line["x"] == pytest.approx([217.6, 269.030016]) and line["y"] == [42.0, 28.5]
    # More tokens/s is better: only speed or quality, from the fastest to the best.
    fast = charts[1].figure["data"][0]
    assert (fast["x"], fast["y"]) == ([1200.0, 900.0], [42.0, 28.5])
    # More score is better, and falls from step to step.
    assert charts[4].figure["data"][0]["x"] == [1200.0, 1100.0, 1000.0, 900.0]
    mean = (0.5 + 0.4 + 0.3 + 0.1) / 4
    assert charts[3].figure["data"][1]["y"][0] == pytest.approx(mean)


def test_a_collapse_makes_the_axis_logarithmic(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    change(folder, "pruned", {"perplexity/heldout": 5000.0})
    axis = charts_of(tradeoff.section(folders.gather([folder], [])))[0].figure["layout"]["yaxis"]
    assert axis["type"] == "log"
    low, high = axis["range"]
    assert 10**low < 28.5 and 5000 < 10**high < 50_000


def test_values_that_are_not_finite_are_not_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    change(folder, "pruned", {"perplexity/heldout": float("inf"), "kl/heldout": float("nan")})
    page = Page(report(folder, tmp_path / "page.html").read_text())
    assert page.figures["quality-1"]["data"][0]["x"] == ["teacher", "repaired", "distilled"]
    assert page.figures["tradeoff-1"]["data"][1]["text"] == ["teacher", "repaired", "distilled"]
    assert "inf" in page.words


def test_labels_are_placed_without_overlap() -> None:
    assert clip("short name") == "short name"
    assert clip("one-long-name-without-any-space") == "one-long-name-without-any…"
    assert places([(0.2, 0.5)], ["name"]) == ["middle right"]
    assert places([(0.98, 0.5)], ["a long name"]) == ["middle left"]
    left, right = places([(0.5, 0.5), (0.55, 0.5)], ["first", "second"])
    assert (left, right) != ("middle right", "middle right")
    assert "right" not in left or not left.startswith("middle")


# Benchmarks


def test_bars_with_errors_and_shares(runs: list[Path]) -> None:
    section = tasks.section(folders.gather(runs[:1], []))
    scores, shares = charts_of(section)
    assert [trace["name"] for trace in scores.figure["data"]] == [
        "teacher", "pruned", "repaired", "distilled",
    ]  # fmt: skip
    pruned = scores.figure["data"][1]
    assert pruned["y"] == ["arc_easy", "lambada_openai", "mmlu", "gsm8k"]
    assert pruned["x"] == pytest.approx([0.475, 0.38, 0.285, 0.095])  # acc_norm where there is one
    assert pruned["error_x"]["array"] == [0.015] * 4
    assert [trace["name"] for trace in shares.figure["data"]] == ["pruned", "repaired", "distilled"]
    assert shares.figure["data"][2]["x"] == pytest.approx([0.85] * 4)
    assert shares.figure["data"][2]["error_x"]["array"] == [0.02] * 4
    assert shares.figure["layout"]["shapes"][0]["x0"] == 1


def test_all_scores_are_in_the_table(runs: list[Path]) -> None:
    section = tasks.section(folders.gather(runs[:1], []))
    ((head, *rows),) = tables(section)
    assert head == ["task", "teacher", "pruned", "repaired", "distilled"]
    assert [row[0] for row in rows] == [
        "arc_easy", "arc_easy", "lambada_openai", "mmlu", "gsm8k", "lambada_openai",
    ]  # fmt: skip
    assert rows[0][1:3] == ["0.600 ± 0.015", "0.570 ± 0.015"]
    assert section is not None
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    assert [cell.small for cell in table.rows[0]] == [
        "acc", "", "95.0% ± 2.0% kept", "90.0% ± 2.0% kept", "85.0% ± 2.0% kept",
    ]  # fmt: skip
    (folded,) = [block for block in section.blocks if isinstance(block, Details)]
    assert "acc, mmlu_anatomy · 0.350 ± 0.015" in folded.text


def test_several_runs_are_drawn_by_teacher_and_result(runs: list[Path]) -> None:
    bars = charts_of(tasks.section(folders.gather(runs, [])))[0].figure["data"]
    assert [trace["name"] for trace in bars] == [
        "first · teacher", "first · distilled", "second · teacher", "second · distilled",
    ]  # fmt: skip


def test_speed_and_task_figures_are_formatted_for_readers() -> None:
    assert figure("ttft", 1234.5) == "1,234 ms"
    assert figure("time_per_output_token_p95", 33.333) == "33.3 ms"
    assert figure("load_time", 1.2345) == "1.23 s"
    assert figure("peak_memory", 3e8) == "300.0 MB"
    assert figure("acc_kept/piqa", 0.9312) == "93.1%"
    assert figure("prefill_of_flops/2 x 128", 0.9) == "90.0%"
    assert figure("acc_norm/piqa", 0.65432) == "0.654"


# Training


def test_every_loss_and_feature_loss_is_drawn_by_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_metrics(folder / "metrics.jsonl", "03-distill", 50, {"forward_kl": 1.0, "hidden": 50.0})
    main_, parts, heldout, rate = charts_of(training.section(folders.gather([folder], [])))
    assert len(main_.figure["data"]) == 3
    assert [trace["name"] for trace in parts.figure["data"]] == ["forward_kl", "hidden"]
    assert parts.figure["layout"]["yaxis"]["type"] == "log"
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    hidden = [row["hidden"] for row in losses if "hidden" in row]
    mean, by_hand = hidden[0], []
    for value in hidden:
        mean += 0.1 * (value - mean)
        by_hand.append(mean)
    assert parts.figure["data"][1]["y"] == pytest.approx(by_hand, rel=1e-4)
    assert [trace["name"] for trace in heldout.figure["data"]] == ["forward_kl", "hidden"]
    assert [trace["name"] for trace in rate.figure["data"]] == ["03-distill"]


def test_a_part_that_is_the_whole_loss_is_not_drawn_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_metrics(folder / "metrics.jsonl", "03-distill", 20, {"forward_kl": 1.0})
    plots = charts_of(training.section(folders.gather([folder], [])))
    assert not [chart for chart in plots if "by name, running means" in chart.caption]


# What it cost


def test_costs_equal_hand_computed_values(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (run,) = folders.gather([folder], [])
    costs = {stage_cost.stage: stage_cost for stage_cost in costs_of(run)}
    teacher, student = 134_515_008, 108_800_000
    assert costs["01-profile"].flops == pytest.approx(2 * teacher * 24_576)
    assert costs["03-distill"].flops == pytest.approx(409_600 * (6 * student + 2 * teacher))
    assert costs["03-distill"].seconds == 1400.0  # of metrics.jsonl, more than the manifest's
    assert costs["02-prune"].flops is None and costs["02-prune"].joules is None
    ((head, *rows),) = tables(cost.section([run]))
    assert head == ["stage", "time", "tokens", "FLOPs", "FLOP/s"]
    assert rows[3] == ["03-distill", "23 min 20 s", "409.6 k", "377.6 T", "269.7 G"]
    assert rows[-1][0] == "all" and rows[-1][2] == "434.2 k"


def test_the_choice_of_a_shape_has_a_row_of_its_own(tmp_path: Path) -> None:
    run = folders.gather([write_run(tmp_path / "run")], [])[0]
    name = next(name for name, each in run.manifests.items() if each["stage"] == "prune")
    before = sum(each.seconds for each in costs_of(run))
    run.manifests[name]["search_seconds"] = 40.0
    costs = {each.stage: each.seconds for each in costs_of(run)}
    assert costs[f"{name}, choice of shape"] == 40.0
    assert sum(costs.values()) == pytest.approx(before + 40)


def test_a_cached_teacher_and_adapters_cost_less(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "stages" / "03-distill" / "manifest.json"
    manifest = json.loads(path.read_text())
    inputs = {"student": STUDENT, "teacher": TEACHER, "cache": "c" * 64}
    write_json(path, {**manifest, "inputs": inputs, "config": {"adapter": "lora"}})
    (run,) = folders.gather([folder], [])
    assert costs_of(run)[3].flops == pytest.approx(409_600 * 4 * 108_800_000)


def test_every_teacher_adds_to_the_cost(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "stages" / "03-distill" / "manifest.json"
    manifest = json.loads(path.read_text())
    inputs = {"student": STUDENT, "teacher": TEACHER, "teacher 2": "p" * 64}
    write_json(path, {**manifest, "inputs": inputs})
    (run,) = folders.gather([folder], [])
    expected = 409_600 * (6 * 108_800_000 + 2 * (134_515_008 + 108_800_000))
    assert costs_of(run)[3].flops == pytest.approx(expected)
    write_json(path, {**manifest, "inputs": {**inputs, "teacher 2": "unknown"}})
    (run,) = folders.gather([folder], [])
    assert costs_of(run)[3].flops is None


def test_sizes_from_the_prunings_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    shutil.rmtree(folder / "stages" / "04-evaluate")
    (run,) = folders.gather([folder], [])
    expected = 409_600 * (6 * 108_800_000 + 2 * 134_515_008)
    assert costs_of(run)[3].flops == pytest.approx(expected)


def test_seconds_are_summed_over_processes() -> None:
    rows = [{"seconds": s} for s in (1.0, 5.0, 10.0, 2.0, 4.0)]
    assert training.seconds_of(rows) == 14.0


def test_energy_is_shown_where_it_was_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "stages" / "03-distill" / "manifest.json"
    manifest = json.loads(path.read_text())
    write_json(path, {**manifest, "energy": {"joules": 36_000.0, "meters": ["RAPL package-0"]}})
    section = cost.section(folders.gather([folder], []))
    ((head, *rows),) = tables(section)
    assert head[-1] == "energy"
    assert [row[-1] for row in rows] == ["–", "–", "–", "10 Wh", "–", "10 Wh"]
    assert section is not None and "Energy by RAPL package-0" in section.note


def test_costs_have_readable_units() -> None:
    assert [flops(v) for v in (3.2e6, 1.5e12, 4.2e15, 9.9e18)] == [
        "3.2 M",
        "1.5 T",
        "4.2 P",
        "9.9 E",
    ]
    assert [watt_hours(v) for v in (3600, 3.6e6, 7.2e7)] == ["1 Wh", "1 kWh", "20 kWh"]


def test_quantized_and_exported_files_are_listed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    figures = [
        {"name": "bytes before", "value": 2e8, "unit": "bytes"},
        {"name": "bytes", "value": 9.93e7, "unit": "bytes"},
        {"name": "bits per parameter", "value": 7.39, "unit": "bits"},
        {"name": "kl", "value": 0.0983, "unit": "nats"},
    ]
    config = {"scheme": "int4-g64", "method": "gptq"}
    (folder / "recipe.yaml").unlink()
    write_manifest(folder / "stages" / "05-quantize", "quantize", config=config, figures=figures)
    ((head, row),) = tables(result.stored(folders.gather([folder], [])))
    assert head == ["stage", "format", "size", "bits per weight", "more"]
    assert row == ["05-quantize", "int4-g64", "99.3 MB", "7.39", ""]
    section = result.stored(folders.gather([folder], []))
    assert section is not None and isinstance(section.blocks[0], Table)
    assert section.blocks[0].rows[0][-1].small == "bytes before 200.0 MB, kl 0.0983 nats"
