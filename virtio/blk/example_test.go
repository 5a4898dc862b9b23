package blk_test

import (
	"fmt"

	"github.com/govmm/govmm/virtio/blk"
)

func ExampleParseConfig() {
	c, err := blk.ParseConfig("path=/srv/a,,b.img,direct,id=root")
	fmt.Println(c.Path, c.Direct, c.ID, err)
	_, err = blk.ParseConfig("root.img,cache=none")
	fmt.Println(err)
	// Output:
	// /srv/a,b.img true root <nil>
	// disk "root.img,cache=none": "cache" is unknown: use path=, readonly, direct, id=, queues=, format=, ephemeral, bps=, iops= (a comma in a path is written twice)
}
