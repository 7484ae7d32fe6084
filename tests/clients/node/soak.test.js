// A soak by grpc-js over one connection that is kept throughout: every call ends as it was meant to, and the server has nothing to
// warn of. FORKRING_TEST_CALLS is the number of calls and messages of the size that has most of them.
'use strict';

const assert = require('node:assert/strict');
const { spawn } = require('node:child_process');
const { once } = require('node:events');
const path = require('node:path');
const readline = require('node:readline');
const { after, before, test } = require('node:test');

const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const ROOT = path.resolve(__dirname, '../../..');
const BINARY = process.env.FORKRING_BIN || path.join(ROOT, 'target/debug/forkring');
const CALLS = Number(process.env.FORKRING_TEST_CALLS || 20_000);
// Payloads, and the part of the calls that they have, as a divisor.
const SIZES = [[0, 10], [64, 2], [1 << 10, 10], [4 << 10, 1], [64 << 10, 20], [1 << 20, 40]];
const IN_FLIGHT = 16;

const { Dispatcher } = grpc.loadPackageDefinition(
  loader.loadSync('forkring/v1/dispatcher.proto', {
    includeDirs: [path.join(ROOT, 'proto')],
    longs: Number,
    enums: String,
    defaults: true,
  }),
).forkring.v1;

let server;
let stderr = '';
let client;
let lost;

before(async () => {
  const settings = Object.entries(process.env).filter(([key]) => !key.startsWith('FORKRING_'));
  const own = ['--name', `soak-node-${process.pid}`, '--listen', '127.0.0.1:0', '--parent', process.pid];
  const pools = ['echo:2=echo', 'stuck=sleep:200ms', 'parts=echo:3000', 'fail=exec:false'];
  const sizes = ['--arena=32MiB', '--max-message=2MiB'];
  server = spawn(BINARY, ['serve', ...own, ...sizes, ...pools.map((pool) => `--pool=${pool}`)], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...Object.fromEntries(settings), FORKRING_LOG: 'warn' },
  });
  server.stderr.on('data', (data) => (stderr += data));
  const [line] = await once(readline.createInterface({ input: server.stdout }), 'line');
  const address = line.match(/^listening on (.+)$/)[1];
  client = new Dispatcher(address, grpc.credentials.createInsecure());
  await new Promise((resolve, reject) =>
    client.waitForReady(Date.now() + 60_000, (error) => (error ? reject(error) : resolve())),
  );
  // Told when the connection is lost.
  const channel = client.getChannel();
  channel.watchConnectivityState(channel.getConnectivityState(false), Infinity, () => {
    lost = channel.getConnectivityState(false);
  });
});

after(async () => {
  client.close();
  server.kill('SIGTERM');
  const [code] = await once(server, 'exit');
  assert.deepEqual([code, stderr], [0, '']);
});

function call(item, options = {}, cancel = false) {
  return new Promise((resolve) => {
    const running = client.call(item, options, (error, answer) => resolve({ error, answer }));
    if (cancel) setImmediate(() => running.cancel());
  });
}

// One call; which kind it is and what it must come to depends on its number.
async function check(n, payload) {
  const kind = n % 64;
  const item = { pool: 'echo', id: n, payload };
  if ([1, 21, 41].includes(kind)) {
    const { error } = await call({ ...item, pool: 'none' });
    assert.equal(error?.code, grpc.status.NOT_FOUND, String(error));
  } else if (kind === 2) {
    const { error } = await call({ ...item, pool: 'fail' });
    assert.equal(error?.code, grpc.status.INTERNAL, String(error));
  } else if (n % 1024 === 9) {
    const { error } = await call({ ...item, payload: Buffer.alloc(3 << 20) });
    assert.equal(error?.code, grpc.status.RESOURCE_EXHAUSTED, String(error));
  } else if (kind % 10 === 5) {
    await expire(n, payload);
  } else if (kind % 10 === 8) {
    const { error } = await call({ ...item, pool: 'stuck' }, {}, true);
    assert.equal(error?.code, grpc.status.CANCELLED, String(error));
  } else {
    const { error, answer } = await call(item);
    assert.equal(error, null);
    assert.ok(answer.id === n && answer.payload.equals(payload));
  }
}

// A call whose deadline passes.
async function expire(n, payload) {
  const { error } = await call({ pool: 'stuck', id: n, payload }, { deadline: Date.now() + 2 });
  assert.equal(error?.code, grpc.status.DEADLINE_EXCEEDED, String(error));
}

async function inFlight(count, each) {
  let next = 0;
  const work = async () => {
    while (next < count) await each(next++);
  };
  await Promise.all(Array.from({ length: IN_FLIGHT }, work));
}

test('calls', async () => {
  for (const [size, part] of SIZES) {
    const payload = Buffer.alloc(size, 7);
    await inFlight(CALLS / part, (n) => check(n, payload));
  }
  assert.equal(lost, undefined);
});

test('every call is cancelled by its deadline', async () => {
  const payload = Buffer.alloc(4 << 10);
  await inFlight(CALLS, (n) => expire(n, payload));
  assert.equal(lost, undefined);
});

test('streams', async () => {
  for (const [size, part] of SIZES) {
    const [count, payload] = [CALLS / part, Buffer.alloc(size)];
    const stream = client.process();
    const send = async () => {
      for (let id = 0; id < count; id++) {
        const pool = ['echo', 'parts', 'echo', 'none'][id % 4];
        if (!stream.write({ pool, id, payload })) await once(stream, 'drain');
      }
      stream.end();
    };
    const sent = send();
    const ended = new Set();
    for await (const result of stream) {
      if (result.partial) continue;
      assert.equal(result.status?.code ?? 0, result.id % 4 === 3 ? grpc.status.NOT_FOUND : 0);
      assert.ok(!ended.has(result.id));
      ended.add(result.id);
    }
    await sent;
    assert.equal(ended.size, count);
  }
  assert.equal(lost, undefined);
});
