"""The definitions that come with Tartarus, built on a Debian from packages: each does a computation of its field."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import yaml

from tartarus.model.shipped import NAMES, place_of

pytestmark = pytest.mark.needs("root", "cgroups", "mmdebstrap", "docker-registry")

DATA_SCIENCE = """
import io, numpy, pandas, scipy.stats, matplotlib.pyplot as plt
table = pandas.read_csv(io.StringIO("x,y\\n1,2\\n2,4\\n3,6.5\\n"))
fit = scipy.stats.linregress(table.x, table.y)
plt.plot(table.x, table.y)
plt.savefig("/tmp/plot.png")
print(round(fit.slope, 2), numpy.linalg.det(numpy.eye(3) * 2).round(), open("/tmp/plot.png", "rb").read(4))
"""
REGRESSION = """
library(data.table)
set.seed(1)
table <- data.table(x = 1:20, group = rep(c("a", "b"), 10))
table[, y := 3 * x + 2]
print(coef(lm(y ~ x, data = table)))
print(table[, .(mean = mean(y)), by = group]$mean)
"""
STREAMS = """
const crypto = require('crypto')
const words = ['tartarus', 'styx'].map(word => crypto.createHash('sha256').update(word).digest('hex').slice(0, 8))
Promise.resolve(words.join(' ')).then(line => console.log(line))
"""
TRAINING = """
import torch
torch.manual_seed(0)
x = torch.linspace(-1, 1, 64).unsqueeze(1)
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for _ in range(200):
    loss = ((model(x) - (3 * x + 1)) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(round(model.weight.item(), 2), round(model.bias.item(), 2), torch.cuda.is_available())
"""
INTERPRETER = """
import io, sympy, sklearn.cluster, openpyxl, bs4, PIL.Image
x = sympy.symbols("x")
book = openpyxl.Workbook()
book.active["A1"] = 42
book.save("/tmp/book.xlsx")
picture = io.BytesIO()
PIL.Image.new("RGB", (2, 2)).save(picture, "png")
labels = sklearn.cluster.KMeans(2, n_init=1, random_state=0).fit([[0], [0.1], [9], [9.1]]).labels_
print(sympy.integrate(x**2, x), openpyxl.load_workbook("/tmp/book.xlsx").active["A1"].value,
      bs4.BeautifulSoup("<p>hi</p>", "lxml").p.text, picture.getvalue()[1:4], labels[0] != labels[2])
"""


@pytest.fixture(scope="module")
def build(tartarus, base):
    def made(name: str, *words: str, context: str = "", called: str = "") -> str:
        where = [context, "-f", f"{context}/template.yaml"] if context else [name]
        called = called or name
        tartarus("template", "build", *where, "--name", called, "--ca-bundle", "--build-arg", f"BASE={base}", *words)
        return called

    return made


def run(tartarus, template: str, *command: str) -> str:
    return str(tartarus("run", "--template", template, "--isolation", "container", "--", *command))


def test_all_of_them_are_well_formed():
    for name in NAMES:
        place = place_of(name)
        assert place is not None
        definition = yaml.safe_load((place / "template.yaml").read_text())
        assert (definition["id"], definition["dockerfile"]) == (name, "Dockerfile")
        assert (place / "Dockerfile").read_text().count("\nFROM ${BASE}\n") == 1


def test_base(tartarus, build):
    build("base")
    assert run(
        tartarus, "base", "sh", "-c", "git --version | cut -d' ' -f1,2; curl --version | cut -c1-4 | head -1"
    ) == ("git version\ncurl\n")


def test_python_ds(tartarus, build):
    assert run(tartarus, build("python-ds", called="my-ds"), "python3", "-c", DATA_SCIENCE) == "2.25 8.0 b'\\x89PNG'\n"


def test_r_analytics(tartarus, build):
    build("r-analytics")
    lines = run(tartarus, "r-analytics", "Rscript", "-e", REGRESSION).splitlines()
    assert [line.split() for line in lines] == [["(Intercept)", "x"], ["2", "3"], ["[1]", "32", "35"]]


def test_node(tartarus, build):
    assert run(tartarus, build("node"), "node", "-e", STREAMS) == "37e68ac7 4576aa0d\n"


def test_code_interpreter(tartarus, build):
    out = run(tartarus, build("code-interpreter-v1"), "python3", "-c", INTERPRETER)
    assert out == "x**3/3 42 hi b'PNG' True\n"


@pytest.mark.needs("torch-wheel")
def test_pytorch(tartarus, build, tmp_path):
    place = place_of("pytorch-ml")
    assert place is not None
    shutil.copytree(place, tmp_path / "context")
    (tmp_path / "context" / "wheels").mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-index", "--no-deps", "torch"]
    subprocess.run([*pip, "--dest", str(tmp_path / "context" / "wheels")], check=True)
    build("pytorch-ml", "--build-arg", "TORCH=torch", context=str(tmp_path / "context"))
    assert run(tartarus, "pytorch-ml", "python3", "-c", TRAINING) == "3.0 1.0 False\n"


@pytest.mark.needs("docker-hub")
def test_julia(tartarus):
    tartarus("template", "build", "julia-sci", "--ca-bundle", timeout_s=900)
    code = "using Statistics, DataFrames; println(mean(DataFrame(a = [1, 2, 6]).a))"
    assert run(tartarus, "julia-sci", "julia", "-e", code) == "3.0\n"
