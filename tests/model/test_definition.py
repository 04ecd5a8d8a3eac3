"""A template's YAML: the roadmap's own, every refusal with its line, and files made to hurt the reader."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tartarus.model.definition import BuildNetwork, Definition, TemplateResources
from tartarus.model.definition_yaml import MAX_FILE_BYTES, read_definition
from tartarus.model.errors import InvalidRequest
from tartarus.model.library import Credentials, ImageSource
from tartarus.model.sandbox import Isolation, Resources
from tartarus.model.security import SeccompAction

ROADMAP = """\
# templates/python-ds.yaml
id: python-ds
name: Python Data Science
base_image: python:3.11-slim
warmup_script: |
  import numpy
  import pandas
  import scipy
  import matplotlib
  print("Libraries loaded")
resources:
  default_cpu: 2
  default_memory: 4096
  max_cpu: 8
  max_memory: 32768
"""


def test_the_roadmaps_yaml_loads_as_it_stands():
    found = read_definition(ROADMAP)
    assert (found.id, found.name, found.base_image) == ("python-ds", "Python Data Science", "python:3.11-slim")
    assert found.warmup_script.splitlines()[0] == "import numpy"
    assert found.warmup_script.splitlines()[-1] == 'print("Libraries loaded")'
    assert found.resources.defaults == Resources(memory_bytes=4096 * 1024**2, cpu_milli=2000)
    assert (found.resources.max_cpu, found.resources.max_memory) == (8, 32768)


def test_every_key_can_be_written():
    text = """
id: mine
name: Mine
description: All of it
version: "1.10"
dockerfile: Dockerfile
packages: [numpy, "pandas>=2,<3", "uvicorn[standard]==0.30.0"]
warmup_script: import numpy
warmup_language: python
ready_check: [python3, -c, import numpy]
resources: {default_cpu: 0.5, default_disk: 2048, default_pids: 64, max_disk: 4096, max_pids: 128}
env: {A: "1"}
workdir: /srv
user: app:app
stop_signal: QUIT
stop_grace_s: 30
labels: {team: red}
isolation: container
network: open
security:
  seccomp_profile: ember
  seccomp_default: kill
  drop_capabilities: [ALL]
  uid_mapping: [{container_id: 0, size: 1000}]
  kernel_lockdown: integrity
"""
    found = read_definition(text)
    assert set(Definition.__struct_fields__) - {"base_image"} <= {
        line.partition(":")[0] for line in text.splitlines() if line
    }
    assert found.isolation is Isolation.CONTAINER
    assert found.network is BuildNetwork.OPEN
    assert found.security is not None
    assert (found.security.seccomp_default, found.security.uid_mapping[0].size) == (SeccompAction.KILL, 1000)
    assert found.version == "1.10"
    assert msgspec.json.decode(msgspec.json.encode(found), type=Definition) == found


BAD = [
    ("id: a\nwarmup_scrip: x\n", 2, "unknown key 'warmup_scrip'", "did you mean 'warmup_script'?"),
    ("id: a\nresources:\n  default_cpus: 2\n", 3, "unknown key 'default_cpus' in resources", "'default_cpu'"),
    ("id: a\nqqqqq: 1\n", 2, "unknown key 'qqqqq'", "known here: base_image"),
    ("id: a\nresources:\n  default_cpu: two\n", 3, "resources.default_cpu: Expected `float`, got `str`", "schema"),
    ("id: a\nresources:\n  default_memory: 4GiB\n", 3, "resources.default_memory: Expected `int`, got `str`", ""),
    ("id: a\nresources: 4\n", 2, "resources: Expected `object`, got `int`", ""),
    ("id: a\nresources:\n\n  default_cpu: 4\n  max_cpu: 2\n", 5, "below the default of 4", "raise max_cpu"),
    ("id: a\nresources:\n  default_memory: 1\n", 3, "out of range", "use 8 or more"),
    ("id: a\nresources:\n  default_cpu: .nan\n", 3, "out of range", ""),
    ("id: a\nenv:\n  A: x\n  PORT: 8080\n", 4, "env.PORT: Expected `str`, got `int`", "quotes"),
    ("id: a\nenv:\n  DEBUG: yes\n", 3, "env.DEBUG: Expected `str`, got `bool`", "quotes"),
    ("id: a\nenv:\n  8080: x\n", 3, "a key that is no text", "quotes"),
    ("id: a\nversion: 1.10\n", 2, "version: Expected `str`, got `float`", "quotes"),
    ("id: a\nversion: 2026-11-21\n", 2, "version: a timestamp is not taken", "quotes"),
    ("id: a\npackages: numpy\n", 2, "packages: Expected `array`, got `str`", ""),
    ("id: a\npackages:\n- numpy\n- 3\n", 4, "packages[1]: Expected `str`, got `int`", ""),
    ("id: a\npackages: ['-r/etc/passwd']\n", 2, "packages: '-r/etc/passwd' is not a package", "numpy"),
    ("id: a\npackages: ['x @ file:///etc']\n", 2, "is not a package", ""),
    ("id: a\npackages: ['../x']\n", 2, "is not a package", ""),
    ("id: a\nisolation: contaner\n", 2, "isolation: 'contaner' is none of the values", "did you mean 'container'?"),
    ("id: a\nwarmup_language: pyton\n", 2, "'pyton' is none of the values", "did you mean 'python'?"),
    ("id: a\nnetwork: all of it\n", 2, "network: 'all of it' is none of the values", "known here: none, open"),
    ("id: sbx-a\n", 1, "id: 'sbx-a' is not a valid name", "letters"),
    ("id: tpl-a\n", 1, "id: 'tpl-a' is not a valid name: ids begin with 'tpl-'", ""),
    ("id: ../../etc\n", 1, "is not a valid name", ""),
    ("id: a\nworkdir: work\n", 2, "'work' is not absolute", "begin it with /"),
    ("id: a\nbase_image: host\ndockerfile: x\n", 3, "base_image is given too", "one of the two"),
    ("id: a\nstop_signal: BYE\n", 2, "stop_signal: 'BYE' is not a signal", "TERM"),
    ("id: a\nstop_grace_s: -1\n", 2, "out of range", "use 0 to"),
    ("id: a\nenv: {'A=B': x}\n", 2, "is not a variable name", ""),
    ("id: a\nlabels: {'a=b': x}\n", 2, "is not a label's key", ""),
    ('id: a\nwarmup_script: "a\\0b"\n', 2, "NUL", ""),
    ("id: a\nid: b\n", 2, "id is there twice", "remove one"),
    ("id: a\nname: !!python/object/apply:os.system [id]\n", 2, "name: Expected `str`, got `array`", ""),
    ("id: a\nname: !!python/name:os.system x\n", 2, "is not taken", ""),
    ("id: a\nname: !mine x\n", 2, "is not taken", ""),
    ("id: a\nname: !!binary aGk=\n", 2, "a binary is not taken", ""),
    ("id: a\nname: &x y\n", 2, "aliases and anchors", "write the value out"),
    ("a: &a [x]\nb: [*a, *a]\n", 1, "aliases and anchors", ""),
    ("id: a\n---\nid: b\n", 2, "a second document", "one file holds one template"),
    ("id: a\n\tname: x\n", 2, "not YAML", "indentation"),
    ("id: [a\n", 2, "not YAML", ""),
    ("id: a\nresources:\n  max_cpu: " + "9" * 5000 + "\n", 3, "not a number", ""),
]


@pytest.mark.parametrize(("text", "line", "what", "fix"), BAD, ids=[text.partition("\n")[2][:30] for text, *_ in BAD])
def test_bad_files_are_refused_whole_and_say_where(text, line, what, fix):
    with pytest.raises(InvalidRequest) as caught:
        read_definition(text, "my.yaml")
    assert str(caught.value).startswith(f"my.yaml, line {line}: "), str(caught.value)
    assert what in str(caught.value)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "has no keys"),
        (b"- a\n", "has no keys"),
        (b"\xff\xfe\x00", "not"),
        (b"id: \xff\n", "not UTF-8"),
        (b"a: " + b"x" * MAX_FILE_BYTES, "bytes long"),
        (b"a: " + b"[" * 100_000, "nested too deeply"),
        (b"{a: " * 50_000, "nested too deeply"),
        (b"? [a]\n: b\n", "a key that is no text"),
        (b"id: a\x00\n", "not"),
    ],
)
def test_files_that_would_hurt_the_reader(text, what):
    with pytest.raises(InvalidRequest, match=what):
        read_definition(text)


@given(
    st.one_of(st.text(max_size=200), st.text(alphabet="ab:-[]{}&*!|>#'\" \n\t?,", max_size=200), st.binary(max_size=99))
)
def test_any_text_is_a_definition_or_refused(text):
    with contextlib.suppress(InvalidRequest):
        assert isinstance(read_definition(text), Definition)


def test_more_than_the_maximum_is_refused():
    limits = TemplateResources(max_cpu=2, max_memory=1024, max_pids=1000)
    limits.check(Resources(memory_bytes=1024**3, cpu_milli=2000), "x")
    with pytest.raises(InvalidRequest, match=r"3 is more CPUs than template 'x' allows.*at most 2"):
        limits.check(Resources(cpu_milli=3000), "x")
    with pytest.raises(InvalidRequest, match="1025MiB is more memory"):
        limits.check(Resources(memory_bytes=1025 * 1024**2), "x")


def test_credentials_are_not_shown():
    secret = Credentials(registry="example.org", username="me", password="hunter2", token="t0ken")
    for shown in (repr(secret), str(secret), repr(ImageSource("python:3.11", (secret,)))):
        assert "example.org" in shown
        assert not any(word in shown for word in ("hunter2", "t0ken", "me'"))


def test_the_published_schema_is_the_structs():
    schema = json.loads((Path(__file__).parents[2] / "docs" / "template.schema.json").read_text())
    definition = schema["$defs"]["Definition"]
    assert set(definition["properties"]) == set(Definition.__struct_fields__)
    assert definition["additionalProperties"] is False
    assert all(
        about.get("description") or "$ref" in about or "anyOf" in about for about in definition["properties"].values()
    )


def test_the_pages_example_is_a_template():
    page = (Path(__file__).parents[2] / "docs" / "templates.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert read_definition(example).packages == ("numpy", "pandas>=2")
    named = set(re.findall(r"`([a-z_]+)`", page.partition("| key |")[2].partition("Unknown keys")[0]))
    assert set(Definition.__struct_fields__) <= named
