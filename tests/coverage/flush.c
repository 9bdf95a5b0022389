/* Part of the core where CBWCORE_COVERAGE is on: a forked child ends by _exit(), which writes no counts. See run.sh. */
void __gcov_dump(void);
__attribute__((visibility("default"))) void cbwcore_coverage_flush(void) { __gcov_dump(); }
