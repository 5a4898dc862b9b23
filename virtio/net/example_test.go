package net_test

import (
	"fmt"

	"github.com/govmm/govmm/virtio/net"
)

// What `--net` says, in full.
func ExampleParseOptions() {
	o, err := net.ParseOptions("tap=tap0,bridge=br0,mac=52:54:00:12:34:56")
	fmt.Println(o, err)
	_, err = net.ParseOptions("tap,queues=99")
	fmt.Println(err)
	// Output:
	// tap=tap0,bridge=br0,mac=52:54:00:12:34:56,queues=1 <nil>
	// net "tap,queues=99": queues=99: must be between 1 and 16
}
