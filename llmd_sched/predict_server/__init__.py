"""``llmd-sched predict-server``: our predictor behind the HTTP API of llm-d's trainer and predictor sidecars."""
