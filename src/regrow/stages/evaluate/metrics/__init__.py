"""Metrics, one file each; the file name is the metric's name (docs/add-a-metric.md).

A metric file has one of three forms. A metric on logits has `per_token` and `READS_TEACHER`, and
either `measure` or `UNIT` and `CONVENTION`; without `measure`, evaluate writes a figure `NAME/TEXT`
with the mean over each text. Otherwise it has `measure(model, context) -> MetricResult`, called
once per model, or `measure_all(models, config, teacher) -> {label: MetricResult}`, called once with
all models.
"""
