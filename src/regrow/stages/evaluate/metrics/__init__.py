"""Metrics, one file each, named by the file (docs/add-a-metric.md).

A metric reads logits, and has `per_token`, `READS_TEACHER` and, unless it has `measure` as well,
`UNIT` and `CONVENTION`; evaluate then writes a figure `NAME/TEXT` with the mean over each text. Or
it has `measure(model, context) -> MetricResult`, which is called once per model; or
`measure_all(models, config, teacher) -> {label: MetricResult}`, which gets all models at once.
"""
