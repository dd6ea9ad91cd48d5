"""``--other-rounding SEED`` runs the tests as on other processors; ``--drives-model FILE`` lists those it could matter to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import other_rounding
import pytest

driving_fixtures: set[str] = set()  # of module or session scope, which drove a model when they were set up
driving_tests: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--other-rounding", metavar="SEED", type=int, help="a relative error of 1e-6 on each velocity")
    parser.addoption("--drives-model", metavar="FILE", help="write the names of the tests that drive a model")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr.strip() != "gpu":  # before the first test file is read: any of them may import triton
        os.environ["TRITON_INTERPRET"] = "1"
    if (seed := config.getoption("--other-rounding")) is None:
        return
    os.environ[other_rounding.VARIABLE] = str(seed)
    from adagrpo.models.registry import FAMILIES, attribute

    for path in [path for family in FAMILIES.values() for path in (family.adapter, family.fused) if path]:
        other_rounding.rounded_elsewhere(attribute(path))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> Iterator[None]:
    before = other_rounding.calls
    result = yield
    if other_rounding.calls > before and fixturedef.scope != "function":
        driving_fixtures.add(fixturedef.argname)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = other_rounding.calls
    result = yield
    if other_rounding.calls > before or driving_fixtures & set(getattr(item, "fixturenames", ())):
        driving_tests.append(item.nodeid)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    if file := session.config.getoption("--drives-model"):
        Path(file).write_text("\n".join(driving_tests) + "\n", "utf-8")
