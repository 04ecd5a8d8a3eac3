/* How a machine's kernel is hardened while it runs, beyond its command line (runtimes/microvm/hardened.py). */
#ifndef TARTARUS_HARDEN_H
#define TARTARUS_HARDEN_H

/* Set what can be set only later; the last thing before programs run, since no module can be loaded afterwards. A
   setting that this kernel has not, it does not need. */
void harden_kernel(void);

#endif
