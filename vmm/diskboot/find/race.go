//go:build race

package find

// raced says that the race detector is built in, which takes far more memory than the
// process may have otherwise.
const raced = true
