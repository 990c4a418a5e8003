"""A whole scheduler whose predictor outlives it."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llmd_sched.app import Scheduler, ServeSettings
from llmd_sched.errors import ConfigError
from llmd_sched.predict import state
from llmd_sched.predict.gate import next_model
from llmd_sched.predict.window import Window
from llmd_sched.stack import free_ports
from tests.builders import CONFIG_HEAD, LATENCY
from tests.integration.test_trainer import samples, until

CONFIG = CONFIG_HEAD + "plugins: [{type: predicted-latency-producer}, {type: latency-scorer}]"


@asynccontextmanager
async def scheduler(folder: Path, state_dir: Path) -> AsyncIterator[Scheduler]:
    grpc_port, health_port, metrics_port, engine_port = free_ports(4)
    file = folder / "endpoints.yaml"
    file.write_text(f"endpoints: [{{name: pod-0, address: 127.0.0.1, port: {engine_port}}}]\n")
    running = Scheduler(
        ServeSettings(
            config_text=CONFIG,
            host="127.0.0.1",
            grpc_port=grpc_port,
            health_port=health_port,
            metrics_port=metrics_port,
            secure_serving=False,
            endpoints_file=str(file),
            drain_timeout_s=0.0,
            predictor_state_dir=str(state_dir),
        )
    )
    await running.start()
    try:
        yield running
    finally:
        await running.stop()


async def test_a_restarted_scheduler_predicts_with_what_the_last_one_learned(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    async with scheduler(tmp_path, folder) as first:
        ((producer, trainer),) = first.trainers
        assert producer.model.version == 0
        for sample in samples(120):
            producer.on_sample(sample)
        await until(lambda: producer.model.version >= 1 and trainer.held["ttft"].rows == 120)
        version = producer.model.version
    async with scheduler(tmp_path, folder) as second:
        ((producer, trainer),) = second.trainers
        assert producer.model.version == version
        await until(lambda: bool(trainer.held) and trainer.held["ttft"].rows == 120)


async def test_a_state_that_cannot_be_used_is_named_in_the_log_and_the_start_is_cold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / state.file_name(LATENCY)
    path.write_bytes(b"not a state")
    with caplog.at_level(logging.WARNING):
        async with scheduler(tmp_path, tmp_path) as running:
            assert running.trainers[0][0].model.version == 0
    assert f"its saved state cannot be used: {path}" in caplog.text


async def test_a_state_of_last_week_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    window = Window()
    for sample in samples(80):
        window.add(sample)
    model = next_model(window, None, version=3, now_s=80.0)
    assert model is not None
    path = tmp_path / state.file_name(LATENCY)
    state.save(path, model, window, time.monotonic(), time.time() - 9 * 86_400)
    with caplog.at_level(logging.WARNING):
        async with scheduler(tmp_path, tmp_path) as running:
            assert running.trainers[0][0].model.version == 0
    assert "9.0 days ago" in caplog.text


async def test_a_state_folder_that_cannot_be_made_is_an_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--predictor-state-dir: cannot write to .*file/folder: Not a directory"):
        async with scheduler(tmp_path, tmp_path / "file" / "folder"):
            pass
