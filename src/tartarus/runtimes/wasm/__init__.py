"""The WASM level: modules run by wasmtime, inside the container level's walls."""
