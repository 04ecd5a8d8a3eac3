/*
 * Watching files with inotify. It watches directories, not trees, so a recursive watch adds each
 * directory it learns of; what was made in one before it was added is found by looking.
 */
#include "files.h"

#include "paths.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	DIRS_MAX = 8192,
	DIRS_PER_ROUND = 16,
	EVENTS_SIZE = 16 << 10,
	WANTED = IN_CREATE | IN_MODIFY | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_ATTRIB | IN_DELETE_SELF | IN_MOVE_SELF,
};

struct watched {
	int number; /* the kernel's, growing: the table stays sorted */
	char *path;
};

struct pending {
	struct pending *next;
	bool report; /* its content is news */
	char path[];
};

struct watch {
	struct stream stream;
	struct source source;
	int fd;
	int root; /* the watch of the path itself */
	bool ready, recursive, announced;
	struct watched *table;
	uint32_t count, capacity;
	struct pending *pending;
	char path[];
};

static void watch_ready(struct session *session, struct source *source, uint32_t events)
{
	(void)session;
	(void)events;
	CONTAINER_OF(source, struct watch, source)->ready = true;
}

static void send_event(struct session *session, const struct watch *watch, const char *kind, const char *directory,
		       const char *name)
{
	uint32_t kind_size = (uint32_t)strlen(kind);
	uint32_t directory_size = (uint32_t)strlen(directory);
	uint32_t name_size = (uint32_t)strlen(name);
	/* "/" already ends in the separator. */
	uint32_t separator = name_size > 0 && directory_size > 0 && directory[directory_size - 1] != '/';
	uint32_t size = 8 + kind_size + directory_size + separator + name_size;
	uint8_t *at = out_reserve(session, size);

	if (at == NULL)
		return;
	put_u32(at, kind_size);
	memcpy(at + 4, kind, kind_size);
	at += 4 + kind_size;
	put_u32(at, directory_size + separator + name_size);
	memcpy(at + 4, directory, directory_size);
	at += 4 + directory_size;
	if (separator)
		*at++ = '/';
	memcpy(at, name, name_size);
	out_commit(session, F_EVENT, 0, watch->stream.id, size);
}

/* The index of a watch number, or where it belongs. */
static uint32_t find(const struct watch *watch, int number)
{
	uint32_t low = 0, high = watch->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (watch->table[middle].number < number)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static struct watched *lookup(const struct watch *watch, int number)
{
	uint32_t index = find(watch, number);

	return index < watch->count && watch->table[index].number == number ? &watch->table[index] : NULL;
}

static void forget(struct watch *watch, uint32_t index)
{
	free(watch->table[index].path);
	watch->count--;
	memmove(watch->table + index, watch->table + index + 1, (watch->count - index) * sizeof *watch->table);
}

/* A directory left the tree: drop it and what is below. */
static void forget_tree(struct watch *watch, const char *path)
{
	size_t length = strlen(path);

	for (uint32_t i = watch->count; i-- > 0;) {
		struct watched *item = &watch->table[i];

		if (strncmp(item->path, path, length) == 0 && (item->path[length] == '/' || item->path[length] == '\0')) {
			inotify_rm_watch(watch->fd, item->number);
			forget(watch, i);
		}
	}
}

/* Record that watch `number` is `path`. False when out of memory. */
static bool record(struct watch *watch, int number, const char *path)
{
	char *copy = strdup(path);
	uint32_t index = find(watch, number);

	if (copy == NULL)
		return false;
	if (index < watch->count && watch->table[index].number == number) {
		free(watch->table[index].path);
		watch->table[index].path = copy;
		return true;
	}
	if (watch->count == watch->capacity) {
		uint32_t capacity = watch->capacity == 0 ? 8 : watch->capacity * 2;
		struct watched *table = realloc(watch->table, capacity * sizeof *table);

		if (table == NULL) {
			free(copy);
			return false;
		}
		watch->table = table;
		watch->capacity = capacity;
	}
	memmove(watch->table + index + 1, watch->table + index, (watch->count - index) * sizeof *watch->table);
	watch->table[index] = (struct watched){number, copy};
	watch->count++;
	return true;
}

static bool join(char out[PATH_MAX], const char *directory, const char *name)
{
	const char *separator = strcmp(directory, "/") == 0 ? "" : "/";

	return snprintf(out, PATH_MAX, "%s%s%s", directory, separator, name) < PATH_MAX;
}

/* False when out of memory. A path too long to watch is skipped. */
static bool add_later(struct watch *watch, const char *directory, const char *name, bool report)
{
	char path[PATH_MAX];

	if (!join(path, directory, name))
		return true;
	struct pending *item = malloc(sizeof *item + strlen(path) + 1);
	if (item == NULL)
		return false;
	strcpy(item->path, path);
	item->report = report;
	item->next = watch->pending;
	watch->pending = item;
	return true;
}

static void end_watch(struct session *session, struct watch *watch, int error)
{
	if (error != 0)
		out_error(session, watch->stream.id, error, "watch");
	else
		out_frame(session, F_RESULT, watch->stream.id, NULL, 0);
	stream_end(&watch->stream);
}

static bool is_directory(int dir, const struct dirent *entry)
{
	struct stat info;

	if (entry->d_type != DT_UNKNOWN)
		return entry->d_type == DT_DIR;
	return fstatat(dir, entry->d_name, &info, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(info.st_mode);
}

static bool is_temporary(const char *name)
{
	return strncmp(name, TEMPORARY_PREFIX, sizeof TEMPORARY_PREFIX - 1) == 0;
}

/* Queue the directories in `path`, and report its content if that is news. False when out of memory. */
static bool look_inside(struct session *session, struct watch *watch, const char *path, bool report)
{
	DIR *dir = opendir(path);
	struct dirent *entry;
	bool ok = true;

	while (ok && dir != NULL && (entry = readdir(dir)) != NULL) {
		if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 || is_temporary(entry->d_name))
			continue;
		if (report)
			send_event(session, watch, "create", path, entry->d_name);
		if (is_directory(dirfd(dir), entry))
			ok = add_later(watch, path, entry->d_name, report);
	}
	if (dir != NULL)
		closedir(dir);
	return ok;
}

/* Take up one queued directory. An errno that ends the watch, or 0. */
static int add_pending(struct session *session, struct watch *watch)
{
	struct pending *item = watch->pending;
	int error = 0;

	watch->pending = item->next;
	int number = inotify_add_watch(watch->fd, item->path, WANTED | IN_ONLYDIR | IN_DONT_FOLLOW);
	if (number < 0 && errno == ENOSPC)
		error = ENOSPC; /* the host's limit on watches: an incomplete watch would lie */
	else if (number >= 0 && watch->count >= DIRS_MAX)
		error = ENOSPC;
	else if (number >= 0 && (!record(watch, number, item->path) || !look_inside(session, watch, item->path, item->report)))
		error = ENOMEM;
	free(item);
	return error;
}

static const char *kind_of(uint32_t mask)
{
	return (mask & (IN_CREATE | IN_MOVED_TO)) != 0	  ? "create"
	       : (mask & IN_MODIFY) != 0		  ? "write"
	       : (mask & (IN_DELETE | IN_DELETE_SELF)) != 0 ? "remove"
	       : (mask & (IN_MOVED_FROM | IN_MOVE_SELF)) != 0 ? "rename"
	       : (mask & IN_ATTRIB) != 0		  ? "attrib"
							  : NULL;
}

/* The kernel dropped events: say so, and learn again which directories there are. */
static bool on_overflow(struct session *session, struct watch *watch)
{
	send_event(session, watch, "overflow", watch->path, "");
	return !watch->recursive || look_inside(session, watch, watch->path, false);
}

/* False when the watch is over. */
static bool on_event(struct session *session, struct watch *watch, const struct inotify_event *event)
{
	const char *name = event->len > 0 ? event->name : "";
	const char *kind = kind_of(event->mask);
	char path[PATH_MAX];

	if ((event->mask & IN_Q_OVERFLOW) != 0)
		return on_overflow(session, watch);
	struct watched *item = lookup(watch, event->wd);
	if (item == NULL || is_temporary(name))
		return true;
	/* A directory below the root is reported by the one above it, which names it. */
	bool self = (event->mask & (IN_DELETE_SELF | IN_MOVE_SELF)) != 0 || (event->len == 0 && (event->mask & IN_ATTRIB) != 0);
	if (kind != NULL && (!self || event->wd == watch->root))
		send_event(session, watch, kind, item->path, name);
	if (event->wd == watch->root && (event->mask & (IN_DELETE_SELF | IN_MOVE_SELF | IN_IGNORED)) != 0)
		return false;
	if ((event->mask & IN_IGNORED) != 0) {
		forget(watch, find(watch, event->wd));
		return true;
	}
	if (!watch->recursive || (event->mask & IN_ISDIR) == 0 || event->len == 0)
		return true;
	if ((event->mask & IN_MOVED_FROM) != 0 && join(path, item->path, name))
		forget_tree(watch, path);
	if ((event->mask & (IN_CREATE | IN_MOVED_TO)) != 0 && !add_later(watch, item->path, name, true))
		return false;
	return true;
}

/* False when the watch is over. */
static bool read_events(struct session *session, struct watch *watch)
{
	_Alignas(struct inotify_event) char bytes[EVENTS_SIZE];
	ssize_t size = read(watch->fd, bytes, sizeof bytes);

	if (size <= 0) {
		watch->ready = false;
		return true;
	}
	for (char *at = bytes; at < bytes + size;) {
		const struct inotify_event *event = (const struct inotify_event *)(void *)at;

		if (!on_event(session, watch, event))
			return false;
		at += sizeof *event + event->len;
	}
	return true;
}

static bool watch_pump(struct session *session, struct stream *stream)
{
	struct watch *watch = CONTAINER_OF(stream, struct watch, stream);

	for (int i = 0; i < DIRS_PER_ROUND && watch->pending != NULL && !out_busy(session); i++) {
		int error = add_pending(session, watch);

		if (error != 0) {
			end_watch(session, watch, error);
			return false;
		}
	}
	if (watch->pending == NULL && !watch->announced) {
		watch->announced = true;
		out_frame(session, F_RESULT, stream->id, NULL, 0);
	}
	if (!watch->announced || out_busy(session))
		return watch->pending != NULL && !out_busy(session);
	if (watch->ready && !read_events(session, watch)) {
		end_watch(session, watch, 0);
		return false;
	}
	return watch->ready || watch->pending != NULL;
}

static void watch_destroy(struct session *session, struct stream *stream)
{
	struct watch *watch = CONTAINER_OF(stream, struct watch, stream);

	session_close(session, &watch->fd);
	for (uint32_t i = 0; i < watch->count; i++)
		free(watch->table[i].path);
	free(watch->table);
	while (watch->pending != NULL) {
		struct pending *item = watch->pending;

		watch->pending = item->next;
		free(item);
	}
}

static const struct stream_kind watch_kind = {.pump = watch_pump, .destroy = watch_destroy};

/* 0 or -errno. */
static int start(struct session *session, struct watch *watch)
{
	watch->fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	if (watch->fd < 0)
		return -errno;
	watch->root = inotify_add_watch(watch->fd, watch->path, WANTED);
	if (watch->root < 0)
		return -errno;
	if (!record(watch, watch->root, watch->path) ||
	    (watch->recursive && !look_inside(session, watch, watch->path, false)))
		return -ENOMEM;
	watch->source.ready = watch_ready;
	return session_watch(session, watch->fd, &watch->source, EPOLLIN) ? 0 : -errno;
}

int serve_watch(struct session *session, uint32_t id, struct cursor *payload)
{
	char path[PATH_MAX];
	int status = get_path(payload, path);
	uint32_t recursive = get_u32(payload);

	if (!cursor_done(payload))
		return -EPROTO;
	size_t length = status != 0 ? 0 : strlen(path);
	struct watch *watch = status != 0 ? NULL : calloc(1, sizeof *watch + length + 1);
	if (watch == NULL) {
		out_error(session, id, status != 0 ? -status : ENOMEM, "watch");
		return 0;
	}
	while (length > 1 && path[length - 1] == '/')
		length--;
	memcpy(watch->path, path, length);
	watch->recursive = recursive != 0;
	watch->fd = -1;
	stream_add(session, &watch->stream, &watch_kind, id);
	status = start(session, watch);
	if (status != 0)
		end_watch(session, watch, -status);
	return 0;
}
