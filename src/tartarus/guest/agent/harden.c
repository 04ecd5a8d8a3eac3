/*
 * The wall around a machine is its monitor, and a root in it may do as it likes. These settings keep its other users
 * from its kernel, and what is locked for good (the first block) a root, too: each of these doors leads from the
 * sandbox's root to the kernel's own code, from which the monitor is attacked.
 */
#include "harden.h"

#include "cmdline.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

enum { WORD_SIZE = 8 };

struct setting {
	const char *path, *value;
};

static const struct setting settings[] = {
	/* Programs that the kernel starts as its own root: they get no capabilities, and modprobe is none. */
	{"/proc/sys/kernel/usermodehelper/bset", "0 0"},
	{"/proc/sys/kernel/usermodehelper/inheritable", "0 0"},
	{"/proc/sys/kernel/modprobe", "\n"},
	{"/proc/sys/kernel/kexec_load_disabled", "1"},
	{"/proc/sys/kernel/unprivileged_bpf_disabled", "1"},
	{"/proc/sys/kernel/modules_disabled", "1"},

	{"/proc/sys/kernel/kptr_restrict", "2"},
	{"/proc/sys/kernel/dmesg_restrict", "1"},
	{"/proc/sys/kernel/perf_event_paranoid", "3"},
	{"/proc/sys/kernel/sysrq", "0"},
	{"/proc/sys/kernel/io_uring_disabled", "2"},
	{"/proc/sys/net/core/bpf_jit_harden", "2"},
	{"/proc/sys/vm/unprivileged_userfaultfd", "0"},
	{"/proc/sys/vm/mmap_min_addr", "65536"},
	{"/proc/sys/dev/tty/ldisc_autoload", "0"},
	{"/proc/sys/dev/tty/legacy_tiocsti", "0"},
	{"/proc/sys/fs/protected_symlinks", "1"},
	{"/proc/sys/fs/protected_hardlinks", "1"},
	{"/proc/sys/fs/protected_fifos", "2"},
	{"/proc/sys/fs/protected_regular", "2"},
	{"/proc/sys/fs/suid_dumpable", "0"},
};

/* What programs may miss: had by asking. */
static const struct setting hardened[] = {
	{"/proc/sys/user/max_user_namespaces", "0"},
	{"/proc/sys/kernel/oops_limit", "1"},
	{"/proc/sys/kernel/warn_limit", "1"},
};

static void put_all(const struct setting *all, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		int fd = open(all[i].path, O_WRONLY | O_CLOEXEC);

		if (fd >= 0) {
			(void)!write(fd, all[i].value, strlen(all[i].value));
			close(fd);
		}
	}
}

void harden_kernel(void)
{
	char said[WORD_SIZE];

	if (cmdline_word("tartarus.hardened", said, sizeof said))
		put_all(hardened, sizeof hardened / sizeof hardened[0]);
	put_all(settings, sizeof settings / sizeof settings[0]);
}
