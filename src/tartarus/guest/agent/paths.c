/* See paths.h. */
#include "paths.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LINKS_MAX = 40, GO_ON = -(1 << 20) /* no errno: there are more steps to take */ };

int get_path(struct cursor *payload, char path[PATH_MAX])
{
	int status = copy_path(get_string(payload), path, PATH_MAX);

	return status != 0 ? status : path[0] == '/' ? 0 : -EINVAL;
}

/* A path being walked: where we are, and what is still to come. */
struct walk {
	int dir;
	unsigned links;
	bool make; /* missing directories are made */
	char rest[PATH_MAX];
};

static int walk_begin(struct walk *walk, int dir, const char *path)
{
	walk->dir = dir;
	walk->links = 0;
	walk->make = false;
	if (dir < 0)
		return -errno;
	if (strlen(path) >= sizeof walk->rest) {
		close(dir);
		return -ENAMETOOLONG;
	}
	strcpy(walk->rest, path);
	return 0;
}

static int open_root(void)
{
	return open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
}

static void move_to(struct walk *walk, int dir)
{
	close(walk->dir);
	walk->dir = dir;
}

/* Put the text of a link before the rest of the path. 0, or -errno; -EINVAL: it is no link. */
static int follow(struct walk *walk, const char *name, const char *after)
{
	char path[PATH_MAX];
	ssize_t size = readlinkat(walk->dir, name, path, sizeof path);
	size_t after_size = strlen(after);

	if (size <= 0)
		return size < 0 ? -errno : -ENOENT;
	if (++walk->links > LINKS_MAX)
		return -ELOOP;
	if ((size_t)size + after_size + 2 > sizeof path)
		return -ENAMETOOLONG;
	if (after_size > 0)
		path[size++] = '/';
	memcpy(path + size, after, after_size + 1);
	if (path[0] == '/') {
		int root = open_root();
		if (root < 0)
			return -errno;
		move_to(walk, root);
	}
	strcpy(walk->rest, path);
	return 0;
}

/* Open a component, or follow it where it is a link: then GO_ON with the new path in `rest`. */
static int open_component(struct walk *walk, const char *name, const char *after, int flags, mode_t mode)
{
	int fd = openat(walk->dir, name, flags | O_NOFOLLOW | O_CLOEXEC, mode);
	int error = fd >= 0 ? 0 : errno;
	struct stat info;

	if ((flags & O_NOFOLLOW) != 0)
		return fd >= 0 ? fd : -error;
	if (fd >= 0) {
		/* O_PATH opens the link itself. */
		if ((flags & O_PATH) == 0 || fstat(fd, &info) != 0 || !S_ISLNK(info.st_mode))
			return fd;
		close(fd);
	} else if (error != ELOOP && error != ENOTDIR) {
		return -error;
	}
	int status = follow(walk, name, after);
	return status == 0 ? GO_ON : status == -EINVAL ? -error : status;
}

/* Take one step towards the end. A descriptor when that was the last one, GO_ON, or -errno. */
static int step(struct walk *walk, int flags, mode_t mode)
{
	char name[NAME_MAX + 1];
	const char *start = walk->rest + strspn(walk->rest, "/");
	size_t length = strcspn(start, "/");
	const char *after = start + length;
	bool last = *after == '\0';
	int fd;

	if (length == 0) {
		fd = openat(walk->dir, ".", (flags & ~O_NOFOLLOW) | O_CLOEXEC, mode);
		return fd >= 0 ? fd : -errno;
	}
	if (length > NAME_MAX)
		return -ENAMETOOLONG;
	memcpy(name, start, length);
	name[length] = '\0';
	after += strspn(after, "/");
	if (walk->make && mkdirat(walk->dir, name, 0755) != 0 && errno != EEXIST)
		return -errno;
	fd = open_component(walk, name, after, last ? flags : O_PATH | O_DIRECTORY, mode);
	if (fd < 0 || last)
		return fd;
	move_to(walk, fd);
	memmove(walk->rest, after, strlen(after) + 1);
	return GO_ON;
}

static int walk_on(struct walk *walk, int flags, mode_t mode)
{
	int fd;

	do
		fd = step(walk, flags, mode);
	while (fd == GO_ON);
	close(walk->dir);
	return fd;
}

int open_path(const char *path, int flags, mode_t mode)
{
	struct walk walk;
	int status = walk_begin(&walk, open_root(), path);

	return status != 0 ? status : walk_on(&walk, flags, mode);
}

int open_in(const struct place *place, int flags, mode_t mode)
{
	struct walk walk;
	int status = walk_begin(&walk, fcntl(place->dir, F_DUPFD_CLOEXEC, 3), place->name);

	return status != 0 ? status : walk_on(&walk, flags, mode);
}

static int open_directory(const char *path, bool make)
{
	struct walk walk;
	int status = walk_begin(&walk, open_root(), path);

	if (status != 0)
		return status;
	walk.make = make;
	return walk_on(&walk, O_PATH | O_DIRECTORY, 0);
}

int place_open(struct place *place, const char *path, bool make)
{
	char directory[PATH_MAX];
	size_t end = strlen(path);

	place->dir = -1;
	while (end > 1 && path[end - 1] == '/')
		end--;
	size_t start = end;
	while (start > 0 && path[start - 1] != '/')
		start--;
	size_t length = end - start;
	if (length == 0 || (length == 1 && path[start] == '.') || (length == 2 && memcmp(path + start, "..", 2) == 0))
		return -EINVAL;
	if (length > NAME_MAX)
		return -ENAMETOOLONG;
	memcpy(directory, path, start);
	directory[start] = '\0';
	memcpy(place->name, path + start, length);
	place->name[length] = '\0';
	int dir = open_directory(directory, make);
	if (dir < 0)
		return dir;
	place->dir = dir;
	return 0;
}

void place_close(struct place *place)
{
	if (place->dir >= 0)
		close(place->dir);
	place->dir = -1;
}

int make_directory(const char *path, mode_t mode, bool parents)
{
	struct place place;
	struct stat info;
	int status = place_open(&place, path, parents);

	if (status != 0)
		return status;
	if (mkdirat(place.dir, place.name, mode & 07777) != 0)
		status = -errno;
	if (status == -EEXIST && parents && fstatat(place.dir, place.name, &info, 0) == 0 && S_ISDIR(info.st_mode))
		status = 0;
	place_close(&place);
	return status;
}
