/* The agent as the first process of a virtual machine: set the machine up, then serve. */
#ifndef TARTARUS_INIT_H
#define TARTARUS_INIT_H

/* Runs as /init of the initramfs (runtimes/microvm/initramfs.py). Never returns: the machine is switched off. */
int init_main(void);

#endif
