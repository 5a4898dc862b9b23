package memory

import (
	"fmt"
	"strings"
	"testing"
	"testing/fstest"
)

// aHost is a host with 1000 MiB available of 4096, 10 huge pages, and no control groups.
func aHost() fstest.MapFS {
	fsys := fstest.MapFS{}
	put(fsys, map[string]string{
		"proc/meminfo":                  "MemTotal:        4194304 kB\nMemFree: 5 kB\nMemAvailable:    1024000 kB\nCommitLimit:     512000 kB\nCommitted_AS:    409600 kB\n",
		"proc/sys/vm/overcommit_memory": "0\n",
	})
	putPool(fsys, 10, 10, 0, 0, 0)
	return fsys
}

func put(fsys fstest.MapFS, files map[string]string) {
	for name, text := range files {
		fsys[name] = &fstest.MapFile{Data: []byte(text)}
	}
}

func putPool(fsys fstest.MapFS, total, free, reserved, overcommit, surplus int) {
	const dir = "sys/kernel/mm/hugepages/hugepages-2048kB/"
	put(fsys, map[string]string{
		dir + "nr_hugepages": fmt.Sprintln(total), dir + "free_hugepages": fmt.Sprintln(free), dir + "resv_hugepages": fmt.Sprintln(reserved),
		dir + "nr_overcommit_hugepages": fmt.Sprintln(overcommit), dir + "surplus_hugepages": fmt.Sprintln(surplus),
	})
}

const (
	v1Mounts = "33 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n" +
		"34 33 0:33 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n" +
		"35 33 0:34 / /sys/fs/cgroup/hugetlb rw,relatime shared:9 - cgroup cgroup rw,hugetlb\n" +
		"41 33 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
	v2Mounts = "41 23 0:38 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
)

// TestAdmit: a guest's memory is admitted up to the byte that is available, and refused
// with the numbers of what is shortest.
func TestAdmit(t *testing.T) {
	v1 := func(files map[string]string) func(fstest.MapFS) {
		return func(fsys fstest.MapFS) {
			put(fsys, map[string]string{"proc/self/mountinfo": v1Mounts, "proc/self/cgroup": "9:hugetlb:/vms/one\n4:cpu,memory:/vms/one\n0::/\n"})
			put(fsys, files)
		}
	}
	v2 := func(files map[string]string) func(fstest.MapFS) {
		return func(fsys fstest.MapFS) {
			put(fsys, map[string]string{"proc/self/mountinfo": v2Mounts, "proc/self/cgroup": "0::/vms/one\n"})
			put(fsys, files)
		}
	}
	const m1, m2, h1 = "sys/fs/cgroup/memory/vms/", "sys/fs/cgroup/vms/", "sys/fs/cgroup/hugetlb/vms/"
	none := "9223372036854771712\n"
	for name, c := range map[string]struct {
		change func(fstest.MapFS)
		b      Backing
		mib    uint64 // available
		says   string
	}{
		"host":                {func(fstest.MapFS) {}, Anonymous, 1000, "this host has 1000 MiB available, of 4096 MiB; make it smaller, or allow overcommit"},
		"strict accounting":   {func(f fstest.MapFS) { put(f, map[string]string{"proc/sys/vm/overcommit_memory": "2\n"}) }, Memfd, 100, "this host has 100 MiB left to commit, of 500 MiB"},
		"pool":                {func(fstest.MapFS) {}, Hugetlb, 20, "20 MiB available in huge pages of 2 MiB (of 10, 10 are free, 0 of these reserved; 0 may be added); add more with `sysctl vm.nr_hugepages=11`, or use backing anonymous"},
		"pool reserved":       {func(f fstest.MapFS) { putPool(f, 10, 7, 4, 0, 0) }, Hugetlb, 6, "of 10, 7 are free, 4 of these reserved"},
		"pool overcommit":     {func(f fstest.MapFS) { putPool(f, 12, 7, 4, 8, 2) }, Hugetlb, 18, "6 may be added"},
		"pool of what is not": {func(f fstest.MapFS) { putPool(f, 0, 0, 0, 4000, 0) }, Hugetlb, 1000, "500 may be added"},
		"v1": {v1(map[string]string{
			m1 + "memory.limit_in_bytes":     fmt.Sprintln(600 << 20),
			m1 + "memory.usage_in_bytes":     fmt.Sprintln(200 << 20),
			m1 + "memory.stat":               fmt.Sprintf("cache 1\ntotal_inactive_file %d\ntotal_active_file %d\n", 30<<20, 20<<20),
			m1 + "one/memory.limit_in_bytes": none,
			m1 + "one/memory.usage_in_bytes": "4096\n",
			m1 + "one/memory.stat":           "cache 0\n",
		}), Anonymous, 450, "the control group /sys/fs/cgroup/memory/vms has 450 MiB available, of 600 MiB (memory.limit_in_bytes)"},
		"v1 huge pages": {v1(map[string]string{
			h1 + "one/hugetlb.2MB.limit_in_bytes":      none,
			h1 + "one/hugetlb.2MB.usage_in_bytes":      "0\n",
			h1 + "one/hugetlb.2MB.rsvd.limit_in_bytes": fmt.Sprintln(8 << 20),
			h1 + "one/hugetlb.2MB.rsvd.usage_in_bytes": fmt.Sprintln(2 << 20),
		}), Hugetlb, 6, "the control group /sys/fs/cgroup/hugetlb/vms/one has 6 MiB available, of 8 MiB (hugetlb.2MB.rsvd.limit_in_bytes); make it smaller, or use backing anonymous"},
		"v2": {v2(map[string]string{
			m2 + "memory.max":         "max\n",
			m2 + "memory.high":        fmt.Sprintln(500 << 20),
			m2 + "memory.current":     fmt.Sprintln(100 << 20),
			m2 + "memory.stat":        fmt.Sprintf("anon 7\ninactive_file %d\nactive_file %d\nslab_reclaimable %d\n", 10<<20, 20<<20, 30<<20),
			m2 + "one/memory.max":     fmt.Sprintln(700 << 20),
			m2 + "one/memory.high":    "max\n",
			m2 + "one/memory.current": "0\n",
			m2 + "one/memory.stat":    "anon 0\n",
		}), Memfd, 460, "the control group /sys/fs/cgroup/vms has 460 MiB available, of 500 MiB (memory.high)"},
		"v2 overdrawn": {v2(map[string]string{
			m2 + "one/memory.max":     fmt.Sprintln(2 << 20),
			m2 + "one/memory.current": fmt.Sprintln(3 << 20),
			m2 + "one/memory.stat":    fmt.Sprintf("inactive_file %d\n", 2<<20),
		}), Anonymous, 1, "the control group /sys/fs/cgroup/vms/one has 1 MiB available, of 2 MiB (memory.max)"},
		"in a container": {func(f fstest.MapFS) {
			put(f, map[string]string{
				"proc/self/mountinfo":      "9 8 0:38 /lower/c\\0401 /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n",
				"proc/self/cgroup":         "0::/lower/c 1\n",
				"sys/fs/cgroup/memory.max": fmt.Sprintln(50 << 20), "sys/fs/cgroup/memory.current": "0\n", "sys/fs/cgroup/memory.stat": "anon 0\n",
			})
		}, Anonymous, 50, "the control group /sys/fs/cgroup has 50 MiB available"},
		"not mounted here": {func(f fstest.MapFS) {
			put(f, map[string]string{"proc/self/mountinfo": "9 8 0:38 /other /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n", "proc/self/cgroup": "0::/othergroup\n"})
		}, Anonymous, 1000, "this host has 1000 MiB"},
	} {
		fsys := aHost()
		c.change(fsys)
		h := host{fsys}
		if err := h.admit(c.mib<<20, c.b, false); err != nil {
			t.Errorf("%s: what is available is refused: %v", name, err)
		}
		err := h.admit(c.mib<<20+4096, c.b, false)
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.HasPrefix(err.Error(), fmt.Sprintf("memory of %d MiB (%s): ", c.mib, c.b)) {
			t.Errorf("%s: error %v, want %q", name, err, c.says)
		}
		if err := h.admit(c.mib<<21, c.b, true); (err != nil) != (c.b == Hugetlb) {
			t.Errorf("%s, with overcommit: %v", name, err)
		}
	}
	h := host{aHost()}
	if err := h.admit(1<<40, Anonymous, true); err == nil || !strings.Contains(err.Error(), "whose tables take 2560 MiB: this host has 1000 MiB available") {
		t.Errorf("1 TiB with overcommit: %v", err)
	}
}

// TestAdmitCannotTell: what cannot be read is an error, what does not exist is no limit.
func TestAdmitCannotTell(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"a limit": {"proc/self/mountinfo": v2Mounts, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "much\n"},
		"meminfo": {"proc/meminfo": "MemTotal: 4 kB\n"},
	} {
		fsys := aHost()
		put(fsys, files)
		if err := (host{fsys}).admit(MinSize, Anonymous, false); err == nil || !strings.Contains(err.Error(), "find out how much memory is available: /") {
			t.Errorf("%s: %v", name, err)
		}
	}
	fsys := aHost()
	delete(fsys, "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
	if err := (host{fsys}).admit(MinSize, Hugetlb, false); err == nil || !strings.Contains(err.Error(), "this kernel has no huge pages of 2 MiB") {
		t.Error(err)
	}
}

// TestAdmitHere asks the host of the test.
func TestAdmitHere(t *testing.T) {
	n, err := Available(Anonymous)
	if err != nil || n < MinSize {
		t.Fatalf("%d bytes available: %v", n, err)
	}
	if err := Admit(MinSize, Anonymous, false); err != nil {
		t.Error(err)
	}
	if err := Admit(MaxSize, Memfd, false); err == nil {
		t.Error("16 TiB are admitted")
	}
}

// FuzzGroups: no content of the files of /proc and of control groups makes it panic or
// walk for ever.
func FuzzGroups(f *testing.F) {
	f.Add(v1Mounts, "4:memory:/vms/one\n0::/\n", "100\n", "total_inactive_file 3\n")
	f.Add(v2Mounts, "0::/../..\n", "max", "")
	f.Add("1 2 3 4\\040 5 - cgroup2 a b\n - cgroup\n", "0::relative", "1", "x")
	f.Fuzz(func(t *testing.T, mounts, groups, limit, stat string) {
		fsys := aHost()
		put(fsys, map[string]string{"proc/self/mountinfo": mounts, "proc/self/cgroup": groups})
		for _, dir := range []string{"sys/fs/cgroup/memory/", "sys/fs/cgroup/memory/vms/", "sys/fs/cgroup/"} {
			put(fsys, map[string]string{dir + "memory.limit_in_bytes": limit, dir + "memory.usage_in_bytes": limit, dir + "memory.stat": stat,
				dir + "memory.max": limit, dir + "memory.current": "1"})
		}
		_ = host{fsys}.admit(MinSize, Anonymous, false)
	})
}
