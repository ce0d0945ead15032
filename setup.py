"""Installation: the native sources travel in the package as dschat_kernels/csrc, compiled when first used.

`DSCHAT_AOT=1 pip install .` compiles them now, for this machine's instruction set, so that no compiler is
needed later; `DSCHAT_AOT=portable,avx2,avx512` names the levels, for an image or a wheel that other machines
will use.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def version() -> str:
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "dschat" / "__init__.py").read_text(), re.M)
    assert match
    return match[1]


def build_module() -> ModuleType:
    """dschat_kernels/build.py by its path: neither the package nor torch is there while a wheel is built."""
    spec = importlib.util.spec_from_file_location("dschat_build", ROOT / "dschat_kernels" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def levels() -> list[str]:
    """ISA levels to compile ahead of time, from DSCHAT_AOT."""
    text = os.environ.get("DSCHAT_AOT", "").strip().lower()
    if text in ("", "0", "false", "no"):
        return []
    build = build_module()
    if text in ("1", "true", "yes"):
        return [build.select_isa()]
    named = [level.strip() for level in text.split(",")]
    for level in named:
        if level not in build.ISA_LEVELS:
            sys.exit(
                f"DSCHAT_AOT has {level!r}: give 1, or some of {', '.join(build.ISA_LEVELS)} with commas."
            )
    return named


class CompileKernels(build_ext):
    """Compiles the same source list as dschat_kernels.build.load(), into dschat_kernels/_native/<isa>."""

    def _folder(self, level: str) -> Path:
        base = ROOT if self.inplace else Path(self.build_lib)
        return base / "dschat_kernels" / "_native" / level

    def run(self) -> None:
        build = build_module()
        for level in levels():
            try:
                build.cpu_build(level).compile_into(self._folder(level))
            except build.BuildError as error:
                sys.exit(str(error))

    def get_outputs(self) -> list[str]:
        build = build_module()
        return [
            str(self._folder(level) / name)
            for level in levels()
            for name in (build.cpu_build(level).filename, "meta.json")
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


serve = ["fastapi", "uvicorn"]
triton = ["triton>=3.9; platform_system == 'Linux'"]
deepspeed = ["deepspeed"]
dev = [
    "deepspeed",
    "fastapi",  # with httpx and uvicorn: dschat serve and the client of its tests
    "httpx",
    "hypothesis",
    "mypy",
    "psutil",
    "pytest",
    "pytest-benchmark",
    "ruff",
    "scipy",
    "setuptools>=77",
    "uvicorn",
    "triton>=3.9; platform_system == 'Linux'",
]

setup(
    name="dschat",
    version=version(),
    description="RLHF with one model that is both the trainer and the fast generator",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["dschat", "dschat.*", "dschat_kernels", "dschat_kernels.*"]),
        "dschat_kernels.csrc.cpu",
        "dschat_kernels.csrc.cuda",
        "dschat_kernels.csrc.bindings",
    ],
    package_dir={"dschat_kernels.csrc": "csrc"},
    package_data={
        "dschat": ["py.typed"],
        "dschat_kernels": ["py.typed"],
        "dschat_kernels.csrc.cpu": ["*.cpp", "*.h"],
        "dschat_kernels.csrc.cuda": ["*.cu", "*.cuh", "*.h"],
        "dschat_kernels.csrc.bindings": ["*.cpp", "*.h"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.13",
        "transformers>=5.23",
        "datasets>=4",
        "gguf>=0.17",
        "matplotlib>=3.9",
        "numpy>=2",
        "packaging",
        "peft>=0.21",
        "pyarrow>=20",
        "pybind11>=3.0",
        "pyyaml>=6",
        "rich>=14",
        "safetensors>=0.6",
        "scikit-learn>=1.7",
        "tensorboard>=2.20",
    ],
    extras_require={"deepspeed": deepspeed, "triton": triton, "serve": serve, "dev": dev},
    entry_points={"console_scripts": ["dschat = dschat.cli:main"]},
    ext_modules=[Extension("dschat_kernels._native", sources=[])] if levels() else [],
    cmdclass={"build_ext": CompileKernels},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: C++",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
