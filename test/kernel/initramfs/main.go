// Command initramfs writes an initial RAM disk with one of the test kernel's
// first processes as /init to standard output.
//
//	go run ./test/kernel/initramfs memhog >initrd.img
package main

import (
	"fmt"
	"os"

	"github.com/govmm/govmm/test/kernel"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: initramfs memhog|diskread >FILE")
		os.Exit(2)
	}
	const pages = 1024 // of pattern, for diskread
	program, err := kernel.Program(os.Args[1], pages)
	if err == nil {
		_, err = os.Stdout.Write(kernel.Initramfs(kernel.File{Name: "init", Data: program}))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "initramfs:", err)
		os.Exit(1)
	}
}
