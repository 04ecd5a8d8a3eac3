/* Reading and writing whole files. A file that is written appears complete, or not at all. */
#include "files.h"

#include "paths.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { READ_PIECE = 128 << 10, WRITE_APPEND = 1, WRITE_PARENTS = 2, WRITE_EXCLUSIVE = 4, WRITE_IN_MEMORY = 8 };
enum { RENAME_NO_REPLACE = 1, TMPFS_MAGIC_NUMBER = 0x01021994 };
#define KEEP_MODE UINT32_MAX
#define DEFAULT_MODE 0644

struct reader {
	struct stream stream;
	int fd;
	uint64_t offset, left, sent, credit;
};

static void finish_read(struct session *session, struct reader *reader, int error)
{
	uint8_t payload[8];

	put_u64(payload, reader->sent);
	if (error != 0)
		out_error(session, reader->stream.id, error, "read");
	else
		out_frame(session, F_RESULT, reader->stream.id, payload, sizeof payload);
	stream_end(&reader->stream);
}

static bool read_pump(struct session *session, struct stream *stream)
{
	struct reader *reader = CONTAINER_OF(stream, struct reader, stream);
	uint64_t size = READ_PIECE;

	if (reader->left == 0) {
		finish_read(session, reader, 0);
		return false;
	}
	if (reader->credit == 0 || out_busy(session))
		return false;
	size = size < reader->left ? size : reader->left;
	size = size < reader->credit ? size : reader->credit;
	uint8_t *room = out_reserve(session, (uint32_t)size);
	if (room == NULL)
		return false;
	ssize_t n = pread(reader->fd, room, size, (off_t)reader->offset);
	if (n < 0 && errno == EINTR)
		return true;
	if (n <= 0) {
		finish_read(session, reader, n < 0 ? errno : 0);
		return false;
	}
	out_commit(session, F_FILE_DATA, 0, stream->id, (uint32_t)n);
	reader->offset += (uint64_t)n;
	reader->sent += (uint64_t)n;
	reader->left -= (uint64_t)n;
	reader->credit -= (uint64_t)n;
	return true;
}

static int read_control(struct session *session, struct stream *stream, const struct frame *frame, struct cursor *payload)
{
	struct reader *reader = CONTAINER_OF(stream, struct reader, stream);
	uint32_t bytes = get_u32(payload);

	(void)session;
	if (frame->type != F_CREDIT || !cursor_done(payload))
		return -EPROTO;
	reader->credit += bytes;
	return 0;
}

static void read_destroy(struct session *session, struct stream *stream)
{
	(void)session;
	close(CONTAINER_OF(stream, struct reader, stream)->fd);
}

static struct allowances read_allowances(const struct stream *stream)
{
	return (struct allowances){((const struct reader *)(const void *)stream)->credit, 0};
}

static const struct stream_kind read_kind = {
	.control = read_control, .pump = read_pump, .destroy = read_destroy, .allowances = read_allowances};

/* 0 when `fd` is a regular file, else -errno. */
static int require_regular(int fd)
{
	struct stat info;

	if (fstat(fd, &info) != 0)
		return -errno;
	return S_ISREG(info.st_mode) ? 0 : S_ISDIR(info.st_mode) ? -EISDIR : -EINVAL;
}

int serve_read(struct session *session, uint32_t id, struct cursor *payload)
{
	char path[PATH_MAX];
	int status = get_path(payload, path);
	uint64_t offset = get_u64(payload);
	uint64_t limit = get_u64(payload);
	uint32_t window = get_u32(payload);

	if (!cursor_done(payload))
		return -EPROTO;
	if (status == 0 && offset > INT64_MAX)
		status = -EINVAL;
	/* Opening a fifo or a device must neither wait nor take a terminal. */
	int fd = status != 0 ? status : open_path(path, O_RDONLY | O_NONBLOCK | O_NOCTTY, 0);
	status = fd < 0 ? fd : require_regular(fd);
	struct reader *reader = status != 0 ? NULL : calloc(1, sizeof *reader);
	if (reader == NULL) {
		if (fd >= 0)
			close(fd);
		out_error(session, id, status != 0 ? -status : ENOMEM, "read");
		return 0;
	}
	reader->fd = fd;
	reader->offset = offset;
	reader->left = limit;
	reader->credit = window;
	stream_add(session, &reader->stream, &read_kind, id);
	return 0;
}

struct writer {
	struct stream stream;
	struct place place;
	char temporary[sizeof TEMPORARY_PREFIX + 16]; /* empty: the file itself is appended to */
	int fd;
	bool exclusive;
	uint64_t written;
};

static int rename_new(int dir, const char *from, const char *to)
{
	if (syscall(SYS_renameat2, dir, from, dir, to, RENAME_NO_REPLACE) == 0)
		return 0;
	if (errno != ENOSYS && errno != EINVAL)
		return -errno;
	/* A link, unlike a rename, never replaces. */
	if (linkat(dir, from, dir, to, 0) != 0 || unlinkat(dir, from, 0) != 0)
		return -errno;
	return 0;
}

static int finish_write(struct writer *writer)
{
	struct place *place = &writer->place;
	int status = 0;

	if (writer->temporary[0] == '\0')
		return 0;
	if (writer->exclusive)
		status = rename_new(place->dir, writer->temporary, place->name);
	else if (renameat(place->dir, writer->temporary, place->dir, place->name) != 0)
		status = -errno;
	if (status == 0)
		writer->temporary[0] = '\0';
	return status;
}

static void fail_write(struct session *session, struct writer *writer, int error)
{
	out_error(session, writer->stream.id, error, "write");
	stream_end(&writer->stream);
}

static int write_data(struct session *session, struct stream *stream, uint8_t type, const uint8_t *bytes, uint32_t size)
{
	struct writer *writer = CONTAINER_OF(stream, struct writer, stream);

	if (type != F_WRITE_DATA)
		return -EPROTO;
	while (size > 0) {
		ssize_t n = write(writer->fd, bytes, size);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			fail_write(session, writer, n < 0 ? errno : ENOSPC);
			return 0;
		}
		bytes += n;
		size -= (uint32_t)n;
		writer->written += (uint64_t)n;
	}
	return 0;
}

static int write_control(struct session *session, struct stream *stream, const struct frame *frame,
			 struct cursor *payload)
{
	struct writer *writer = CONTAINER_OF(stream, struct writer, stream);
	uint8_t answer[8];

	if (frame->type != F_WRITE_END || !cursor_done(payload))
		return -EPROTO;
	int status = finish_write(writer);
	if (status != 0) {
		fail_write(session, writer, -status);
		return 0;
	}
	put_u64(answer, writer->written);
	out_frame(session, F_RESULT, stream->id, answer, sizeof answer);
	stream_end(stream);
	return 0;
}

static void write_destroy(struct session *session, struct stream *stream)
{
	struct writer *writer = CONTAINER_OF(stream, struct writer, stream);

	(void)session;
	if (writer->temporary[0] != '\0')
		unlinkat(writer->place.dir, writer->temporary, 0);
	if (writer->fd >= 0)
		close(writer->fd);
	place_close(&writer->place);
}

static const struct stream_kind write_kind = {.control = write_control, .data = write_data, .destroy = write_destroy};

static int open_append(struct writer *writer, uint32_t mode)
{
	writer->fd = open_in(&writer->place, O_WRONLY | O_APPEND | O_CREAT | O_NONBLOCK | O_NOCTTY,
			     mode == KEEP_MODE ? DEFAULT_MODE : mode & 07777);
	return writer->fd < 0 ? writer->fd : require_regular(writer->fd);
}

static int open_temporary(struct writer *writer, uint32_t mode)
{
	struct stat old;
	bool exists = fstatat(writer->place.dir, writer->place.name, &old, AT_SYMLINK_NOFOLLOW) == 0;
	uint64_t random = 0;

	if (exists && writer->exclusive)
		return -EEXIST;
	if (exists && !S_ISREG(old.st_mode) && !S_ISLNK(old.st_mode))
		return S_ISDIR(old.st_mode) ? -EISDIR : -EINVAL;
	if (mode == KEEP_MODE)
		mode = exists && S_ISREG(old.st_mode) ? old.st_mode & 0777 : DEFAULT_MODE;
	if (getrandom(&random, sizeof random, GRND_NONBLOCK) != (ssize_t)sizeof random)
		random = (uint64_t)monotonic_ms() << 32 | writer->stream.id;
	snprintf(writer->temporary, sizeof writer->temporary, TEMPORARY_PREFIX "%016llx", (unsigned long long)random);
	writer->fd = openat(writer->place.dir, writer->temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (writer->fd < 0) {
		writer->temporary[0] = '\0';
		return -errno;
	}
	return fchmod(writer->fd, mode & 07777) == 0 ? 0 : -errno;
}

/* 0 when what is written into the directory is never on a disk of the sandbox's, else -errno. */
static int require_memory(int dir)
{
	struct statfs info;

	if (fstatfs(dir, &info) != 0)
		return -errno;
	return info.f_type == TMPFS_MAGIC_NUMBER ? 0 : -EXDEV;
}

int serve_write(struct session *session, uint32_t id, struct cursor *payload)
{
	char path[PATH_MAX];
	int status = get_path(payload, path);
	uint32_t mode = get_u32(payload);
	uint32_t flags = get_u32(payload);

	if (!cursor_done(payload))
		return -EPROTO;
	struct writer *writer = status != 0 ? NULL : calloc(1, sizeof *writer);
	if (writer == NULL) {
		out_error(session, id, status != 0 ? -status : ENOMEM, "write");
		return 0;
	}
	writer->fd = -1;
	writer->exclusive = (flags & WRITE_EXCLUSIVE) != 0;
	stream_add(session, &writer->stream, &write_kind, id);
	status = place_open(&writer->place, path, (flags & WRITE_PARENTS) != 0);
	if (status == 0 && (flags & WRITE_IN_MEMORY) != 0)
		status = require_memory(writer->place.dir);
	if (status == 0)
		status = (flags & WRITE_APPEND) != 0 ? open_append(writer, mode) : open_temporary(writer, mode);
	if (status != 0)
		fail_write(session, writer, -status);
	return 0;
}
