/* The guest agent: the first process of every sandbox, and the host's hands inside it. */
#ifndef TARTARUS_AGENT_H
#define TARTARUS_AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

enum { GROUPS_MAX_KEPT = 64 };

struct agent_config {
	int channel_fd;         /* stream to the host: a socket, or the port of a virtual console; -1: not accepted yet */
	int listen_fd;          /* where the channel is accepted from, each time it was lost; -1: it is lost for good */
	int runner_fd;          /* SOCK_STREAM socket to the warm runner, or -1 */
	int group_fd;           /* of a machine: the control group that its programs are born in, or -1 */
	pid_t runner_pid;       /* the warm runner, a child of this process, or 0 */
	bool own_pid_namespace; /* true: this process is pid 1 and its end is everybody's end */
	bool machine;           /* true: this process is init of a virtual machine, which may be saved and restored */
	/* Of a machine: whose programs it runs. */
	uid_t uid;
	gid_t gid;
	gid_t groups[GROUPS_MAX_KEPT];
	size_t n_groups;
};

/* Serve the channel until it closes. Never returns before every process of the sandbox was told to die. */
int agent_main(const struct agent_config *config);

#endif
