"""Modules and components in text, assembled with wasmtime's own assembler."""

from __future__ import annotations

import functools

import wasmtime

WASI = """
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $fd_close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_prestat_get" (func $fd_prestat_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_prestat_dir_name" (func $fd_prestat_dir_name (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_symlink" (func $path_symlink (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_link"
    (func $path_link (param i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll_oneoff (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "sock_accept" (func $sock_accept (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 2)
  (func $write (param $fd i32) (param $at i32) (param $size i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $size))
    (if (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8)) (then (call $proc_exit (i32.const 99)))))
"""


@functools.cache
def assemble(text: str) -> bytes:
    """A module or component, in the binary format."""
    return bytes(wasmtime.wat2wasm(text))


def program(body: str, *fields: str) -> bytes:
    """A WASI command whose _start is `body`; address 0 to 1023 is `$write`'s and the test's scratch."""
    return assemble(f'(module {WASI} {" ".join(fields)} (func (export "_start") {body}))')


def data(at: int, content: str) -> str:
    """A data segment."""
    return f'(data (i32.const {at}) "{content}")'


HELLO = program(
    "(call $write (i32.const 1) (i32.const 1024) (i32.const 6)) (call $proc_exit (i32.const 7))", data(1024, r"hello\n")
)
# Prints what the host gave: its arguments, ended by NULs.
ARGUMENTS = program(
    """(drop (call $args_sizes_get (i32.const 16) (i32.const 20)))
       (drop (call $args_get (i32.const 2048) (i32.const 8192)))
       (call $write (i32.const 1) (i32.const 8192) (i32.load (i32.const 20)))"""
)
ENVIRONMENT = program(
    """(drop (call $environ_sizes_get (i32.const 16) (i32.const 20)))
       (drop (call $environ_get (i32.const 2048) (i32.const 8192)))
       (call $write (i32.const 1) (i32.const 8192) (i32.load (i32.const 20)))"""
)
# Copies standard input to standard output.
CAT = program(
    """(loop $again
         (i32.store (i32.const 32) (i32.const 8192)) (i32.store (i32.const 36) (i32.const 65536))
         (drop (call $fd_read (i32.const 0) (i32.const 32) (i32.const 1) (i32.const 40)))
         (if (i32.load (i32.const 40))
           (then (call $write (i32.const 1) (i32.const 8192) (i32.load (i32.const 40))) (br $again))))"""
)
LOOP = program("(loop $again (br $again))")
RANDOM = program(
    """(drop (call $random_get (i32.const 1024) (i32.const 32)))
       (call $write (i32.const 1) (i32.const 1024) (i32.const 32))"""
)
# Opens what its first argument names, below each directory it has; prints the file's first bytes, or "errno NN".
OPEN = program(
    r"""(local $fd i32) (local $failed i32)
       (drop (call $args_sizes_get (i32.const 16) (i32.const 20)))
       (drop (call $args_get (i32.const 2048) (i32.const 8192)))
       (local.set $fd (i32.const 3))
       (loop $again
         (if (i32.eqz (call $fd_prestat_get (local.get $fd) (i32.const 64)))
           (then
             (local.set $failed (call $path_open (local.get $fd) (i32.const 1) (i32.load (i32.const 2052))
               (i32.sub (i32.add (i32.const 8192) (i32.sub (i32.load (i32.const 20)) (i32.const 1)))
                 (i32.load (i32.const 2052)))
               (i32.const 0) (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 80)))
             (if (local.get $failed)
               (then
                 (i32.store8 (i32.const 1030) (i32.add (i32.const 48) (i32.div_u (local.get $failed) (i32.const 10))))
                 (i32.store8 (i32.const 1031) (i32.add (i32.const 48) (i32.rem_u (local.get $failed) (i32.const 10))))
                 (call $write (i32.const 1) (i32.const 1024) (i32.const 9)))
               (else
                 (i32.store (i32.const 32) (i32.const 16384)) (i32.store (i32.const 36) (i32.const 4096))
                 (drop (call $fd_read (i32.load (i32.const 80)) (i32.const 32) (i32.const 1) (i32.const 40)))
                 (call $write (i32.const 1) (i32.const 16384) (i32.load (i32.const 40)))))
             (local.set $fd (i32.add (local.get $fd) (i32.const 1)))
             (br $again))))""",
    data(1024, r"errno NN\n"),
)


def component(code: int) -> bytes:
    """A component of the command world whose run returns `code`: 0 is success, 1 its error."""
    return assemble(
        f"""(component
          (core module $m (func (export "run") (result i32) i32.const {code}))
          (core instance $i (instantiate $m))
          (func $run (result (result)) (canon lift (core func $i "run")))
          (instance $inst (export "run" (func $run)))
          (export "wasi:cli/run@0.2.0" (instance $inst)))"""
    )


# A component that exits by way of wasi:cli/exit.
EXITING = assemble(
    """(component
      (import "wasi:cli/exit@0.2.0" (instance $exit (export "exit" (func (param "status" (result))))))
      (core func $exit (canon lower (func $exit "exit")))
      (core module $m
        (import "wasi" "exit" (func $exit (param i32)))
        (func (export "run") (result i32) (call $exit (i32.const 1)) (i32.const 0)))
      (core instance $i (instantiate $m (with "wasi" (instance (export "exit" (func $exit))))))
      (func $run (result (result)) (canon lift (core func $i "run")))
      (instance $inst (export "run" (func $run)))
      (export "wasi:cli/run@0.2.3" (instance $inst)))"""
)
# A component that prints through wasi:cli/stdout.
SPEAKING = assemble(
    r"""(component
      (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
      (alias export $error "error" (type $error-type))
      (import "wasi:io/streams@0.2.0" (instance $streams
        (export "output-stream" (type $out (sub resource)))
        (alias outer 1 $error-type (type $e0))
        (export "error" (type $e1 (eq $e0)))
        (type $failed (variant (case "last-operation-failed" (own $e1)) (case "closed")))
        (export "stream-error" (type $stream-error (eq $failed)))
        (export "[method]output-stream.blocking-write-and-flush"
          (func (param "self" (borrow $out)) (param "contents" (list u8)) (result (result (error $stream-error)))))))
      (alias export $streams "output-stream" (type $out))
      (import "wasi:cli/stdout@0.2.0" (instance $stdout
        (alias outer 1 $out (type $o0))
        (export "output-stream" (type $o1 (eq $o0)))
        (export "get-stdout" (func (result (own $o1))))))
      (core module $memory (memory (export "memory") 1) (data (i32.const 64) "spoken\n"))
      (core instance $mem (instantiate $memory))
      (core func $get (canon lower (func $stdout "get-stdout")))
      (core func $write (canon lower (func $streams "[method]output-stream.blocking-write-and-flush")
        (memory (core memory $mem "memory"))))
      (core module $m
        (import "wasi" "get" (func $get (result i32)))
        (import "wasi" "write" (func $write (param i32 i32 i32 i32)))
        (func (export "run") (result i32)
          (call $write (call $get) (i32.const 64) (i32.const 7) (i32.const 0)) (i32.const 0)))
      (core instance $i (instantiate $m
        (with "wasi" (instance (export "get" (func $get)) (export "write" (func $write))))))
      (func $run (result (result)) (canon lift (core func $i "run")))
      (instance $inst (export "run" (func $run)))
      (export "wasi:cli/run@0.2.0" (instance $inst)))"""
)
