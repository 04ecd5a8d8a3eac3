/*
 * The plain executor of syscall programs. It knows nothing of what a program means: the host
 * decides (guest/program.py), this file checks bounds and calls.
 */
#include "program.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { KIND_SYSCALL = 0, KIND_RELOC = 1 };
enum { TAG_IMM = 0, TAG_BLOB = 1, TAG_FD = 2, TAG_LOAD = 3 };

struct __attribute__((packed)) header {
	char magic[4];
	uint16_t version;
	uint16_t n_ops;
	uint32_t blob_len;
};

struct __attribute__((packed)) op {
	uint8_t kind;
	uint8_t flags;
	uint16_t ok_errno;
	int32_t nr;
	int32_t store_at;
	uint32_t step;
	uint8_t tags[6];
	uint8_t pad[2];
	uint64_t args[6];
};

_Static_assert(sizeof(struct op) == 72, "the wire format of an op is 72 bytes");

struct memory {
	unsigned char *bytes;
	uint64_t size;
	const int *fds;
	size_t n_fds;
};

static bool inside(const struct memory *m, uint64_t offset, uint64_t size)
{
	return size <= m->size && offset <= m->size - size;
}

static bool resolve(const struct memory *m, uint8_t tag, uint64_t value, long *out)
{
	int32_t loaded;

	switch (tag) {
	case TAG_IMM:
		*out = (long)value;
		return true;
	case TAG_BLOB:
		if (!inside(m, value, 0))
			return false;
		*out = (long)(uintptr_t)(m->bytes + value);
		return true;
	case TAG_FD:
		if (value >= m->n_fds)
			return false;
		*out = m->fds[value];
		return true;
	case TAG_LOAD:
		if (!inside(m, value, sizeof loaded))
			return false;
		memcpy(&loaded, m->bytes + value, sizeof loaded);
		*out = loaded;
		return true;
	default:
		return false;
	}
}

/* 0, or the errno of the failed call; EINVAL for a malformed op. */
static int run_op(const struct memory *m, const struct op *op)
{
	long args[6];

	if (op->kind == KIND_RELOC) {
		if (!inside(m, op->args[0], 0) || !inside(m, op->args[1], sizeof(uint64_t)))
			return EINVAL;
		uint64_t address = (uint64_t)(uintptr_t)(m->bytes + op->args[0]);
		memcpy(m->bytes + op->args[1], &address, sizeof address);
		return 0;
	}
	if (op->kind != KIND_SYSCALL || op->flags != 0)
		return EINVAL;
	for (int i = 0; i < 6; i++)
		if (!resolve(m, op->tags[i], op->args[i], &args[i]))
			return EINVAL;
	long result = syscall(op->nr, args[0], args[1], args[2], args[3], args[4], args[5]);
	if (result < 0)
		return op->ok_errno != 0 && errno == op->ok_errno ? 0 : errno;
	if (op->store_at >= 0) {
		int32_t stored = (int32_t)result;
		if (!inside(m, (uint64_t)op->store_at, sizeof stored))
			return EINVAL;
		memcpy(m->bytes + op->store_at, &stored, sizeof stored);
	}
	return 0;
}

int program_run(unsigned char *data, size_t size, const int *fds, size_t n_fds, struct program_failure *failure)
{
	struct header header;

	failure->step = UINT32_MAX;
	failure->error = EINVAL;
	if (size < sizeof header)
		return -1;
	memcpy(&header, data, sizeof header);
	uint64_t ops_size = (uint64_t)header.n_ops * sizeof(struct op);
	if (memcmp(header.magic, "TPRG", 4) != 0 || header.version != 1 ||
	    sizeof header + ops_size + header.blob_len != size)
		return -1;
	struct memory m = {data + sizeof header + ops_size, header.blob_len, fds, n_fds};
	for (uint16_t i = 0; i < header.n_ops; i++) {
		struct op op;
		memcpy(&op, data + sizeof header + i * sizeof op, sizeof op);
		int error = run_op(&m, &op);
		if (error != 0) {
			failure->step = op.step;
			failure->error = (uint32_t)error;
			return -1;
		}
	}
	return 0;
}
