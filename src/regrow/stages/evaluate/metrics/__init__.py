"""Metrics, one file each, named by the file.

A metric is `measure(subject, context) -> Measured`: figures of one loaded model, and generations
if it makes any. `subject.windows(text)` are the model's final hidden states on a text, computed
once for all metrics; `context.teacher` is None when there is nothing to compare with. A figure is
named `what`, `what/text` or `what/task`. What is to be measured of all models at once has
`measure_all(subjects, config, teacher) -> {label: Measured}` instead.
"""
