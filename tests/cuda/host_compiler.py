"""Compiles CUDA sources for the CPU with g++: tests/cuda/shim stands in for CUDA's headers.

Results are cached by the content of all inputs, in the system's temporary folder or in
CROSSVIT_SHIM_CACHE.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path(__file__).resolve().parent / "kernels"

# Source lines are for the sanitizers' reports: they take a sixth of the compiler's time.
SANITIZER_FLAGS = {
    # Misaligned vector accesses are faults on a GPU.
    "address": ("-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all", "-g1"),
    "thread": ("-fsanitize=thread", "-g1"),
    None: (),
}
INCLUDES = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda'}")
# Without the last flag, two libraries in one process would share the shim's state.
OPTIONS = ("-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique")
FLAGS = (*OPTIONS, *INCLUDES)


class CompilationError(RuntimeError):
    """The compiler's output."""


def cache() -> Path:
    default = Path(tempfile.gettempdir()) / f"crossvit-shim-{os.getuid()}"
    folder = Path(os.environ.get("CROSSVIT_SHIM_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def compiler() -> str:
    """The compiler's path and version, or "" if the shim supports none."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        path = shutil.which(name) if name else None
        if not path:
            continue
        version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        if "Free Software Foundation" in version:
            return f"{path}\n{version}"
    return ""


def compiler_path() -> str:
    return compiler().split("\n")[0]


@functools.cache
def why_not(sanitizer: str | None = None) -> str | None:
    """Why sources cannot be compiled (with this sanitizer), or None."""
    if os.name != "posix" or not compiler():
        return "needs g++"
    if sanitizer is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("int main() {}\n")
        probe = Path(folder) / "probe"
        flags = SANITIZER_FLAGS[sanitizer]
        for command in ([compiler_path(), *flags, str(source), "-o", str(probe)], [str(probe)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return f"no {sanitizer} sanitizer: {(done.stdout + done.stderr)[-200:].strip()}"
    return None


def _digest(*parts: str | bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:24]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompilationError(f"{' '.join(command)}\n{done.stderr}")


@contextlib.contextmanager
def _alone(key: str) -> Iterator[None]:
    """Wait until no other thread or process is at the same work."""
    import fcntl  # only on POSIX

    with (cache() / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _object(source: Path, flags: tuple[str, ...]) -> Path:
    """Compile one source, if it or something it includes has changed.

    The workers of pytest-xdist want the same sources at the same time: each takes what the others
    have compiled.
    """
    key = _digest(compiler(), *flags, str(source))
    with _alone(key):
        return _object_of(key, source, flags)


def _object_of(key: str, source: Path, flags: tuple[str, ...]) -> Path:
    names = cache() / f"{key}.reads"

    def content_of_all_it_reads() -> str:
        return _digest(*(Path(name).read_bytes() for name in names.read_text().splitlines()))

    if names.exists():
        try:
            cached = cache() / f"{key}-{content_of_all_it_reads()}.o"
            if cached.exists():
                return cached
        except FileNotFoundError:
            pass  # a header was deleted
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        made, rule = Path(folder) / "made.o", Path(folder) / "made.d"
        language = ("-x", "c++") if source.suffix == ".cu" else ()
        outputs = ("-MMD", "-MF", str(rule), "-o", str(made))
        _run([compiler_path(), *flags, *outputs, *language, "-c", str(source)])
        reads = rule.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        (Path(folder) / "reads").write_text("\n".join(reads))
        os.replace(Path(folder) / "reads", names)
        target = cache() / f"{key}-{content_of_all_it_reads()}.o"
        os.replace(made, target)
    return target


def _link(
    sources: Sequence[Path],
    kind: str,
    sanitizer: str | None,
    defines: Sequence[str],
    flags: Sequence[str],
) -> Path:
    compile_flags = (*FLAGS, *SANITIZER_FLAGS[sanitizer], *(f"-D{d}" for d in defines), *flags)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _object(source, compile_flags), sources))
    link_flags = (*SANITIZER_FLAGS[sanitizer], *(("-shared",) if kind == "so" else ()))
    names = [path.name for path in objects]
    target = cache() / f"{sources[0].stem}-{_digest(*link_flags, *names)}.{kind}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            made = Path(folder) / "made"
            _run([compiler_path(), *link_flags, *map(str, objects), "-o", str(made)])
            os.replace(made, target)
    return target


def library(
    sources: Sequence[Path],
    *,
    sanitizer: str | None = None,
    defines: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Compile a shared library. With a sanitizer, Python must run in environment()."""
    return _link(sources, "so", sanitizer, defines, flags)


def program(
    sources: Sequence[Path],
    *,
    sanitizer: str | None = None,
    defines: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Compile a program; one of the sources has a main()."""
    return _link(sources, "out", sanitizer, defines, flags)


def changed(source: Path, replacements: Sequence[tuple[str, str]]) -> Path:
    """Return a source with texts replaced in order; each must occur exactly once."""
    return changed_tree(source.parent, {source.name: replacements}) / source.name


def changed_tree(root: Path, replacements: Mapping[str, Sequence[tuple[str, str]]]) -> Path:
    """Write changed copies of these files of `root`; return their folder."""
    texts = {}
    for name, changes in replacements.items():
        text = (root / name).read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{name} has {text.count(old)} times: {old}"
            text = text.replace(old, new)
        texts[name] = text
    folder = cache() / f"changed-{_digest(*texts, *texts.values())}"
    for name, text in texts.items():
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            copy.write_text(text)
    return folder


def environment(
    seed: int | None = None, sanitizer: str | None = None, *, preload: bool = False
) -> dict[str, str]:
    """Environment to run results in; `preload` if Python loads a library with a sanitizer."""
    variables = {k: v for k, v in os.environ.items() if k != "CROSSVIT_SHIM_SEED"}
    if seed is not None:
        variables["CROSSVIT_SHIM_SEED"] = str(seed)
    variables["ASAN_OPTIONS"] = "detect_leaks=0"
    variables["TSAN_OPTIONS"] = "halt_on_error=1:atexit_sleep_ms=0"
    if preload and sanitizer:
        # Without libstdc++ too, the library's first exception aborts.
        names = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer], "libstdc++.so"
        command = [compiler_path(), *(f"-print-file-name={name}" for name in names)]
        libraries = [
            subprocess.check_output([command[0], c], text=True).strip() for c in command[1:]
        ]
        variables["LD_PRELOAD"] = " ".join(libraries)
    return variables


def run(
    path: Path, seed: int | None = None, *, arguments: Sequence[str] = (), timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a program; a data race or a bad address ends it with a report."""
    return subprocess.run(
        [str(path), *arguments],
        capture_output=True,
        text=True,
        env=environment(seed),
        timeout=timeout,
    )
