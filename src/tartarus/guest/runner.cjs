// The warm Node.js runner: an interpreter that has loaded a template's modules, and waits for one program.
//
// `node runner.cjs`, with messages on standard input (tartarus/guest/parked.py has the format): first what to warm
// up, and when that is done one byte, ACK, goes to standard output; then what to run, and another ACK, after which
// standard input and output are the program's. NAK and a reason instead mean: this needs an interpreter of its own.
//
// User code must find a fresh interpreter: `node SCRIPT`, `node -e CODE` and `node -p CODE` run here by the same
// entry points that node itself uses, from an empty stack, and nothing of this file stays in sight.
'use strict';

const fs = require('fs');
const Module = require('module');
const path = require('path');
const vm = require('vm');

const ACK = '\x06';
const NAK = '\x15';
// For an import() that the host did not see in a program's text; node warns of it.
const LOADER = vm.constants && vm.constants.USE_MAIN_CONTEXT_DEFAULT_LOADER;
const [MAJOR] = process.versions.node.split('.').map(Number);

function read(size) {
  const buffer = Buffer.alloc(size);
  for (let at = 0; at < size;) {
    const count = fs.readSync(0, buffer, at, size - at, null);
    if (!count) process.exit(0); // the host has no use for it any more
    at += count;
  }
  return buffer;
}

// The next message's strings: one by one, or several with their number before them.
function receive() {
  const head = read(8);
  const words = read(head.readUInt32LE(0)).toString('utf8').split('\0');
  let at = 0;
  const next = () => words[at++];
  return { next, some: () => Array.from({ length: Number(next()) }, next) };
}

class Refused extends Error {}

async function warmUp() {
  const said = receive();
  const require = Module.createRequire(path.join(process.cwd(), 'warm-up.js'));
  for (const name of said.some()) {
    try {
      require(name);
    } catch (error) {
      if (error.code !== 'ERR_REQUIRE_ESM' && error.code !== 'ERR_REQUIRE_ASYNC_MODULE') throw error;
      await import(require.resolve(name));
    }
  }
  const script = said.next();
  if (script) {
    const warm = new Module('warm-up');
    warm.filename = path.join(process.cwd(), 'warm-up.js');
    warm.paths = Module._nodeModulePaths(process.cwd());
    warm._compile(script, warm.filename);
    await warm.exports;
  }
}

// `node SCRIPT`: the very function that node calls, which also tells CommonJS from ES modules.
function prepareScript(script) {
  const entry = path.resolve(script);
  const found = Module._findPath(entry, null, true);
  if (!found) throw new Refused('no such script');
  process.argv[1] = entry;
  // For modules that were loaded by the warm-up, `require.main` stays this module: give it the program's name.
  module.filename = fs.realpathSync(found);
  module.path = path.dirname(module.filename);
  module.paths = Module._nodeModulePaths(module.path);
  return [Module.runMain, entry];
}

// What node does for -e and -p (lib/internal/process/execution.js), with public means.
function prepareEval(option, code, print) {
  const name = '[eval]';
  if (MAJOR < 20 && print) throw new Refused('this node prints at its end');
  const program = new Module(name);
  program.filename = path.join(process.cwd(), name);
  program.paths = Module._nodeModulePaths(process.cwd());
  let script;
  try {
    script = new vm.Script(code, { filename: name, importModuleDynamically: LOADER });
  } catch (error) {
    throw new Refused(error.message); // or an ES module, or TypeScript: node knows
  }
  process.execArgv = [option, code];
  tell('_eval', code);
  if (print) tell('_print_eval', true);
  nameBuiltins();
  globalThis.__filename = name;
  const enter = program._compile(
    `
      globalThis.module = module;
      globalThis.exports = exports;
      globalThis.__dirname = __dirname;
      globalThis.require = require;
      return (main) => ${print ? 'console.log(main())' : 'main()'};
    `,
    `${name}-wrapper`,
  );
  return [enter, script.runInThisContext.bind(script, { displayErrors: true })];
}

// child_process.fork, for one, wants to know.
function tell(name, value) {
  Object.defineProperty(process, name, { __proto__: null, writable: false, configurable: true, enumerable: true, value });
}

// As addBuiltinLibsToObject of node: `fs` and its kin as globals that load when used and can be replaced.
function nameBuiltins() {
  const loader = new Module('<eval>');
  for (const name of Module.builtinModules) {
    if (name[0] === '_' || name.includes('/') || Object.hasOwn(globalThis, name)) continue;
    const set = (value) => {
      delete globalThis[name];
      globalThis[name] = value;
    };
    const define = (get) => {
      Object.defineProperty(globalThis, name, { __proto__: null, get, set, configurable: true, enumerable: false });
    };
    define(() => {
      const library = loader.require(name);
      try {
        define(() => library);
      } catch {
        // No longer configurable: then it loads again, and gets the same.
      }
      return library;
    });
  }
}

// Take over what the command was given; returns the call that starts it.
function prepare(said) {
  const cwd = said.next();
  const input = said.next();
  const [mode, program, option] = [said.next(), said.next(), said.next()];
  for (const name of said.some()) delete process.env[name];
  for (const item of said.some()) {
    const equals = item.indexOf('=');
    process.env[item.slice(0, equals)] = item.slice(equals + 1);
  }
  try {
    process.chdir(cwd);
  } catch {
    throw new Refused('no such directory');
  }
  process.argv.length = 1;
  delete process.mainModule;
  delete Module._cache[__filename];
  const call = mode === 'file' ? prepareScript(program) : prepareEval(option, program, mode === 'print');
  process.argv.push(...said.some());
  if (!input) {
    fs.closeSync(0);
    fs.openSync('/dev/null', 'r'); // the lowest free descriptor: 0
  }
  return call;
}

function serve() {
  fs.writeSync(1, ACK);
  let call;
  try {
    call = prepare(receive());
  } catch (error) {
    fs.writeSync(1, NAK + error.message.slice(0, 500));
    process.exit(0);
  }
  /^/.exec(''); // as node does: no trace of our regular expressions
  fs.writeSync(1, ACK);
  process.nextTick(...call); // from an empty stack
}

fs.unlinkSync(__filename);
warmUp().then(serve, (error) => {
  console.error(error);
  process.exit(1);
});
