"""Installation: the native sources travel in the package as dschat_kernels/csrc, compiled when first used.

`DSCHAT_AOT=1 pip install .` compiles them now, for this machine's instruction set, so that no compiler is
needed later; `DSCHAT_AOT=portable,avx2,avx512` (on ARM `portable,neon,neon_bf16`) names the levels, for an image
or a wheel that other machines will use. GPU architectures go into the same list: `DSCHAT_AOT=avx512,sm_80,sm_90`
(`cuda`: all that the kernels are written for), compiled by nvcc, with or without a GPU in the machine.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def version() -> str:
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "dschat" / "__init__.py").read_text(), re.M)
    assert match
    return match[1]


def build_module() -> ModuleType:
    """dschat_kernels.build of this folder, which needs the standard library only: there is no torch while a wheel is
    built."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from dschat_kernels import build

    return build


def levels() -> list[str]:
    """ISA levels and GPU architectures to compile ahead of time, from DSCHAT_AOT."""
    text = os.environ.get("DSCHAT_AOT", "").strip().lower()
    if text in ("", "0", "false", "no"):
        return []
    build = build_module()
    if text in ("1", "true", "yes"):
        return [build.select_isa()]
    known = (*build.instruction_sets.levels(), *build.CUDA_ARCHS)
    named: list[str] = []
    for level in (level.strip() for level in text.split(",")):
        if level not in (*known, "cuda"):
            sys.exit(f"DSCHAT_AOT has {level!r}: give 1, cuda, or some of {', '.join(known)} with commas.")
        named += build.CUDA_ARCHS if level == "cuda" else [level]
    return named


def kernels(build: ModuleType, level: str) -> Any:
    """The build of an ISA level or GPU architecture."""
    return build.cuda_build(level) if level in build.CUDA_ARCHS else build.cpu_build(level)


class CompileKernels(build_ext):
    """Compiles the same source lists as dschat_kernels.build.load() and load_cuda(), into
    dschat_kernels/_native/<level>."""

    def _folder(self, level: str) -> Path:
        base = ROOT if self.inplace else Path(self.build_lib)
        return base / "dschat_kernels" / "_native" / level

    def run(self) -> None:
        build = build_module()
        for level in levels():
            try:
                kernels(build, level).compile_into(self._folder(level))
            except build.BuildError as error:
                sys.exit(str(error))

    def get_outputs(self) -> list[str]:
        build = build_module()
        return [
            str(self._folder(level) / name)
            for level in levels()
            for name in (kernels(build, level).filename, "meta.json")
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


serve = ["fastapi", "uvicorn"]
triton = ["triton>=3.6; platform_system == 'Linux'"]
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
    "pytest-xdist",
    "ruff",
    "scipy",
    "setuptools>=77",
    "uvicorn",
    "triton>=3.6; platform_system == 'Linux'",
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
        "transformers>=5.23,<5.25",
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
    entry_points={"console_scripts": ["dschat = dschat.cli:command"]},
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
