/* What init knows of its machine's sandbox: whose programs it runs, what holds them together, what is parked there. */
#ifndef TARTARUS_MACHINE_H
#define TARTARUS_MACHINE_H

#include "agent.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A small file of the initramfs: its bytes, with a NUL behind them, or NULL. The caller frees it. */
char *read_all(const char *path, size_t *size);
/* The user, from the initramfs; root where nothing is said. False when it can't be understood. */
bool user_read(struct agent_config *config);
/* Make the group that all programs are in. Without it there are no limits to set, which `group_limit` then says. */
void group_make(struct agent_config *config);
/* Limit it: most tasks, and bytes of memory. */
bool group_limit(uint32_t tasks, uint64_t memory);
/* Stand all programs still, or let them go on. True once all of them do. */
bool group_freeze(bool on);
/* How many processes the kernel killed for want of memory since this was last asked. */
uint32_t memory_kills(void);
/* In a new process: go into that group, unless root bore it there, and become the sandbox's user, for good. False with
   errno. */
bool become_program(const struct agent_config *config, bool in_group);
/* Act as the sandbox's user, whose files the host asks for, or, where only root may do it, as root again. */
void act_as_user(const struct agent_config *config);
void act_as_root(const struct agent_config *config);
/* From the initramfs: how programs are confined, and the interpreter that is to be parked beside the agent. Then start
   that, and wait until it is. */
void companion_read(void);
void companion_start(struct agent_config *config);

#endif
