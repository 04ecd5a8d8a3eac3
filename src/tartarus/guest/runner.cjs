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

// What node does for the text of a program (lib/internal/process/execution.js), with public means.
function prepareText(name, code, print) {
  const program = new Module(name);
  program.filename = path.join(process.cwd(), name);
  program.paths = Module._nodeModulePaths(process.cwd());
  let script;
  try {
    script = new vm.Script(code, { filename: name, importModuleDynamically: LOADER });
  } catch (error) {
    throw new Refused(error.message); // or an ES module, or TypeScript: node knows
  }
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

// `node -e CODE`, `node -p CODE`.
function prepareEval(option, code, print) {
  if (MAJOR < 20 && print) throw new Refused('this node prints at its end');
  const call = prepareText('[eval]', code, print);
  process.execArgv = [option, code];
  tell('_eval', code);
  if (print) tell('_print_eval', true);
  nameBuiltins();
  return call;
}

// `node -`, `node < FILE`: the program is known only when all of it has been read. By then the command has started, so
// one that needs a fresh interpreter gets it in a child process, which this one stands for.
function runInput() {
  let code = '';
  process.stdin.setEncoding('utf8');
  process.stdin.on('data', (text) => {
    code += text;
  });
  process.stdin.on('end', () => {
    let call;
    try {
      if (/\b(import|crypto)\b/.test(code)) throw new Refused('these mean more to a fresh interpreter');
      call = prepareText('[stdin]', code, false);
    } catch {
      return runAfresh(code);
    }
    process._eval = code;
    /^/.exec('');
    process.nextTick(...call);
  });
}

function runAfresh(code) {
  const how = { argv0: process.argv0, stdio: ['pipe', 'inherit', 'inherit'] };
  const child = require('child_process').spawn(process.execPath, process.argv.slice(1), how);
  child.stdin.on('error', () => {}); // it need not read its program to the end
  child.stdin.end(code);
  const signals = ['SIGHUP', 'SIGINT', 'SIGQUIT', 'SIGTERM', 'SIGUSR2'];
  for (const signal of signals) process.on(signal, () => child.kill(signal));
  child.on('exit', (status, signal) => {
    if (!signal) process.exit(status);
    process.removeAllListeners(signal);
    process.kill(process.pid, signal);
  });
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
  const prepared = {
    file: () => prepareScript(program),
    text: () => prepareEval(option, program, false),
    print: () => prepareEval(option, program, true),
    input: () => [runInput],
    context: () => [() => new Context().serve()], // once it is accepted, as it moves the descriptors
  };
  const call = prepared[mode]();
  process.argv.push(...said.some());
  if (!input) {
    fs.closeSync(0);
    fs.openSync('/dev/null', 'r'); // the lowest free descriptor: 0
  }
  return call;
}

// ------------------------------------------------------------------------------------------------ code contexts

const LARGEST_FORM = 16 * 1024 * 1024;
const IMPORT = '__importModule';
const SHARED = 'Symbol.for("tartarus")';

// Cells come as JSON lines on what was descriptor 0, events go as JSON lines to what was descriptor 1. A cell is
// evaluated as node's own debugger console does it: names may be declared again, `await` works at the top.
class Context {
  constructor() {
    this.commands = 0;
    this.events = 1;
    try {
      // Out of the way of user code, which knows descriptors 0 to 2. What child processes print goes nowhere.
      this.events = fs.openSync('/proc/self/fd/1', 'w');
      this.commands = fs.openSync('/proc/self/fd/0', 'r');
      fs.closeSync(0);
      fs.openSync('/dev/null', 'r');
      fs.closeSync(1);
      fs.openSync('/proc/self/fd/2', 'w');
    } catch (error) {
      // At process level there is no /proc/self: a child that prints to our output ends the context.
      if (this.events !== 1) throw error;
    }
    this.id = null;
    this.count = 0;
    this.interrupt = null;
    this.exit = process.exit;
    this.inspect = require('util').inspect;
    this.shared = { run: null, value: undefined }; // with scripts that only see globals
    Object.defineProperty(globalThis, Symbol.for('tartarus'), { value: this.shared });
    this.session = new (require('inspector').Session)();
    this.session.connect();
  }

  serve() {
    this.adopt();
    let pending = '';
    let turn = Promise.resolve();
    const input = new (require('net').Socket)({ fd: this.commands, readable: true, writable: false });
    input.setEncoding('utf8');
    input.on('data', (text) => {
      const lines = (pending + text).split('\n');
      pending = lines.pop();
      for (const line of lines) turn = turn.then(() => this.cell(JSON.parse(line)));
    });
    input.on('end', () => turn.then(() => this.exit.call(process, 0)));
  }

  // What cells find: the names of node's console, output that becomes events, and no way to end the context by accident.
  adopt() {
    nameBuiltins();
    const program = new Module('[context]');
    program.filename = path.join(process.cwd(), '[context]');
    program.paths = Module._nodeModulePaths(process.cwd());
    const enter = program._compile(
      `Object.assign(globalThis, { module, exports, require, __filename: '[context]', __dirname });
       return (name, how) => (how ? import(name, how) : import(name));`,
      program.filename,
    );
    const hidden = (name, value) => {
      Object.defineProperty(globalThis, name, { value, writable: true, configurable: true, enumerable: false });
    };
    hidden(IMPORT, enter);
    hidden('display', (...values) => values.forEach((value) => this.show(value, false)));
    for (const [name, stream] of [['stdout', process.stdout], ['stderr', process.stderr]]) {
      const decoder = new (require('string_decoder').StringDecoder)('utf8');
      stream.write = (chunk, encoding, done) => {
        const text = typeof chunk === 'string' ? chunk : decoder.write(Buffer.from(chunk));
        if (text) this.send({ type: name, text });
        const after = typeof encoding === 'function' ? encoding : done;
        if (after) process.nextTick(after);
        return true;
      };
    }
    process.exit = (code) => {
      throw Object.assign(new Error(String(code ?? process.exitCode ?? 0)), { name: 'SystemExit' });
    };
    process.on('uncaughtException', (error) => process.stderr.write(`Uncaught ${this.traceback(error)}\n`));
    process.on('SIGINT', () => this.interrupt && this.interrupt('KeyboardInterrupt', ''));
    const { result } = this.post('Runtime.evaluate', { expression: 'globalThis' });
    this.self = result.objectId;
  }

  async cell({ id, code, timeout_s: limit }) {
    this.id = id ?? null;
    this.count += 1;
    const error = await this.run(String(code), limit);
    if (error) this.send({ type: 'error', ...error });
    this.send({ type: 'done', execution_count: this.count });
  }

  // Run one cell to its end, its time limit or an interrupt, whichever comes first; returns the error, if any.
  async run(code, limit) {
    const late = () => ({ name: 'CellTimeout', value: `the cell ran longer than ${limit} s`, traceback: '' });
    const began = performance.now();
    const left = () => Math.max(1, Math.ceil(limit * 1000 - (performance.now() - began)));
    let evaluated;
    const stopped = new Promise((resolve) => {
      this.interrupt = (name, value) => resolve({ error: { name, value, traceback: '' } });
    });
    try {
      // The outer script is what a signal or the time limit stops, and the cell with it.
      const outer = { breakOnSigint: true, ...(limit ? { timeout: left() } : {}) };
      this.shared.run = () => {
        evaluated = new Promise((resolve) => this.evaluate(code, resolve));
      };
      new vm.Script(`globalThis[${SHARED}].run()`).runInThisContext(outer);
    } catch (error) {
      if (error.code === 'ERR_SCRIPT_EXECUTION_TIMEOUT') return late();
      return { name: 'KeyboardInterrupt', value: '', traceback: '' };
    }
    let timer;
    if (limit) timer = setTimeout(() => this.interrupt && this.interrupt('CellTimeout', late().value), left());
    const { error } = await Promise.race([evaluated, stopped]);
    clearTimeout(timer);
    this.interrupt = null;
    return error;
  }

  // Evaluate, and show the value of the last expression; `done` gets { error }.
  evaluate(code, done) {
    // import() has no meaning in the debugger's evaluations: outside of strings and comments it becomes a call.
    const skip = /(['"`])(?:\\.|(?!\1)[^\\])*\1|\/\/.*|\/\*[^]*?\*\/|(?<![.\w$])import(?=\s*\()/g;
    const expression = code.replace(skip, (text) => (text === 'import' ? IMPORT : text));
    const how = { expression: `${expression}\n//# sourceURL=cell-${this.count}`, replMode: true, awaitPromise: true };
    this.session.post('Runtime.evaluate', how, (failure, answer) => {
      if (failure) return done({ error: { name: 'Error', value: failure.message, traceback: '' } });
      const { result, exceptionDetails } = answer;
      const value = this.fetch(exceptionDetails ? exceptionDetails.exception : result);
      if (exceptionDetails) return done({ error: this.describe(value) });
      if (value !== undefined) this.show(value, true);
      return done({});
    });
  }

  post(method, parameters) {
    let answer;
    this.session.post(method, parameters, (failure, result) => {
      answer = result;
    });
    return answer;
  }

  // The value that the debugger's answer stands for.
  fetch({ objectId, unserializableValue, value }) {
    const argument = objectId ? { objectId } : unserializableValue ? { unserializableValue } : { value };
    const functionDeclaration = `function (value) { this[${SHARED}].value = value }`;
    this.post('Runtime.callFunctionOn', { objectId: this.self, functionDeclaration, arguments: [argument] });
    const fetched = this.shared.value;
    this.shared.value = undefined;
    if (objectId) this.post('Runtime.releaseObject', { objectId });
    return fetched;
  }

  describe(error) {
    if (!(error instanceof Error)) return { name: 'Error', value: this.form(error), traceback: `Uncaught ${this.form(error)}` };
    return { name: String(error.name), value: String(error.message), traceback: this.traceback(error) };
  }

  traceback(error) {
    const text = error instanceof Error ? String(error.stack) : this.form(error);
    const lines = text.split('\n');
    const ours = lines.findIndex((line) => /^\s+at .*\b(node:inspector|Session\.post)\b/.test(line));
    return (ours < 0 ? lines : lines.slice(0, ours)).join('\n');
  }

  form(value) {
    try {
      return this.inspect(value);
    } catch (error) {
      return `<a value that can't be shown: ${error && error.message}>`;
    }
  }

  show(value, main) {
    const text = this.form(value);
    if (text.length <= LARGEST_FORM) this.send({ type: 'result', data: { 'text/plain': text }, is_main: main });
  }

  send(event) {
    const data = Buffer.from(`${JSON.stringify({ id: this.id, ...event })}\n`);
    for (let at = 0; at < data.length;) at += fs.writeSync(this.events, data, at);
  }
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
