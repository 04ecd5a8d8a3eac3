/* The nursery: one small process per prepared template that forks guests on request. */
#ifndef TARTARUS_NURSERY_H
#define TARTARUS_NURSERY_H

int nursery_main(int argc, char **argv);

#endif
