# SPDX-License-Identifier: Apache-2.0
"""What is said in several of the project's files is the same in all."""

import re
import tomllib

import yaml

from tests.test_imports import ROOT


def read(name):
  return (ROOT / name).read_text(encoding="utf-8")


def project():
  return tomllib.loads(read("pyproject.toml"))["project"]


def test_the_version_is_that_of_the_changelog_and_the_citation():
  version = project()["version"]
  assert yaml.safe_load(read("CITATION.cff"))["version"] == version
  sections = re.findall(r"^## \[(.*?)\]", read("CHANGELOG.md"), re.M)
  assert next(s for s in sections if s != "Unreleased") == version


def test_hooks_have_the_versions_of_ci():
  extra = project()["optional-dependencies"]["test"]
  (repo,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
  wanted = {
    name
    for hook in repo["hooks"]
    for name in hook.get("additional_dependencies", ())
  }
  assert wanted
  assert wanted <= set(extra)


def test_ci_tests_the_pythons_that_are_promised():
  jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
  pythons = jobs["test"]["strategy"]["matrix"]["python"]
  assert f">={pythons[0]}" == project()["requires-python"]
  said = " ".join(project()["classifiers"])
  assert all(f":: {python}" in said for python in pythons)
  runs = [step["run"] for step in jobs["test"]["steps"] if "run" in step]
  assert runs == [".ci/run"]
  targets = {
    step["run"].removeprefix("make ")
    for name in ("site", "wheel")
    for step in jobs[name]["steps"]
    if "run" in step
  }
  assert targets <= set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
