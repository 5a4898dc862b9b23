// Package bootid identifies the boot of this host's kernel.
package bootid

import (
	"bytes"
	"os"
	"sync"
)

// ID is new at each boot of the kernel (random(4)); "" if it cannot be read, which is equal
// to no other. It is read once: a process that is in a sandbox later calls it before.
var ID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(b))
})
