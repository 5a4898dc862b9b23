package api_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

func TestValidateName(t *testing.T) {
	for _, good := range []string{"vm", "vm2", "A", "9", "a.b-c_d", strings.Repeat("x", 64)} {
		if err := api.ValidateName(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{"", ".", "..", ".vm", "-vm", "_vm", "a/b", "a b", "ä", "a\n", "a\x00", strings.Repeat("x", 65)} {
		if err := api.ValidateName(bad); !errors.Is(err, vmm.ErrInvalid) {
			t.Errorf("%q: %v, want ErrInvalid", bad, err)
		}
	}
}

func TestDefaultNames(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "govmm")
	var claims []*api.Claim
	for _, want := range []string{"vm", "vm2", "vm3"} {
		c, err := api.ClaimName(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Release()
		if c.Name() != want {
			t.Errorf("name %q, want %q", c.Name(), want)
		}
		claims = append(claims, c)
	}
	claims[1].Release()
	c, err := api.ClaimName(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Release()
	if c.Name() != "vm2" {
		t.Errorf("after vm2 was released the next name is %q", c.Name())
	}
	if _, err := api.ClaimName(dir, "vm3"); !errors.Is(err, api.ErrNameTaken) || strings.Contains(err.Error(), "\n") {
		t.Errorf("a taken name: %v, want one line of ErrNameTaken", err)
	}
	st, err := os.Stat(dir)
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v %v, want 0700", st.Mode(), err)
	}
}

// Many claimants at once, among the stale sockets of dead VMs, never share a name and
// leave no gap.
func TestClaimRace(t *testing.T) {
	dir := t.TempDir()
	for round := range 20 {
		leaveStale(t, filepath.Join(dir, "vm.sock"))
		leaveStale(t, filepath.Join(dir, "vm3.sock"))
		const n = 8
		claims := make([]*api.Claim, n)
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				c, err := api.ClaimName(dir, "")
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := c.Listen(); err != nil {
					t.Error(err)
				}
				claims[i] = c
			})
		}
		wg.Wait()
		seen := map[string]bool{}
		for _, c := range claims {
			if c == nil {
				t.Fatal("a claim failed")
			}
			if seen[c.Name()] {
				t.Fatalf("round %d: %q was given twice", round, c.Name())
			}
			seen[c.Name()] = true
		}
		for _, c := range claims {
			wg.Go(c.Release)
		}
		wg.Wait()
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// One name, many claimants that come and go: at most one holds it.
func TestClaimOneName(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex // held while the name is
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				c, err := api.ClaimName(dir, "db")
				if errors.Is(err, api.ErrNameTaken) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if !mu.TryLock() {
					t.Error("two hold the name")
				} else {
					mu.Unlock()
				}
				c.Release()
			}
		})
	}
	wg.Wait()
}

// leaveStale makes a socket that nobody listens on, as kill -9 leaves one.
func leaveStale(t *testing.T, path string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	_ = ln.Close()
}

func TestStaleSocketIsReplaced(t *testing.T) {
	dir := t.TempDir()
	leaveStale(t, filepath.Join(dir, "db.sock"))
	entries, err := api.List(context.Background(), dir)
	if err != nil || len(entries) != 0 {
		t.Errorf("List sees %v, %v; want nothing", entries, err)
	}
	if _, err := api.Find(context.Background(), dir, "db"); !errors.Is(err, api.ErrNotRunning) {
		t.Errorf("Find: %v, want ErrNotRunning", err)
	}
	c, _ := serve(t, dir, "db", &fakeVM{})
	if info, err := c.Info(context.Background()); err != nil || info.Name != "db" {
		t.Errorf("%+v, %v", info, err)
	}
}

func TestSocketModeIgnoresUmask(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	dir := filepath.Join(t.TempDir(), "d")
	c, err := api.ClaimName(dir, "vm")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Release()
	if _, err := c.Listen(); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(c.Socket())
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, %v; want 0600", st.Mode(), err)
	}
	st, err = os.Stat(dir)
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("directory %v, %v; want 0700", st.Mode(), err)
	}
}

func TestDirectoryIsTightened(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	c, err := api.ClaimName(dir, "vm")
	if err != nil {
		t.Fatal(err)
	}
	c.Release()
	if st, _ := os.Stat(dir); st.Mode().Perm() != 0o700 {
		t.Errorf("directory has mode %v", st.Mode())
	}
}

func TestForeignDirectory(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if _, err := api.ClaimName(link, "vm"); err == nil {
		t.Error("a claim went through a symbolic link")
	}
	if _, err := api.Find(context.Background(), link, "vm"); err == nil || errors.Is(err, api.ErrNotRunning) {
		t.Errorf("Find through a symbolic link: %v", err)
	}
	if os.Geteuid() == 0 {
		foreign := filepath.Join(dir, "foreign")
		if err := os.Mkdir(foreign, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(foreign, 4711, 4711); err != nil {
			t.Fatal(err)
		}
		if _, err := api.ClaimName(foreign, "vm"); err == nil {
			t.Error("a claim in somebody else's directory")
		}
	}
}

func TestClaimSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "own.sock")
	c, err := api.ClaimSocket(path, "")
	if err != nil {
		t.Fatal(err)
	}
	if c.Name() != "vm" || c.Socket() != path {
		t.Errorf("%q at %q", c.Name(), c.Socket())
	}
	if _, err := api.ClaimSocket(path, "other"); !errors.Is(err, api.ErrSocketInUse) {
		t.Errorf("second claim of one path: %v", err)
	}
	c.Release()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := api.ClaimSocket(file, ""); !errors.Is(err, api.ErrSocketInUse) {
		t.Errorf("a path with a file: %v", err)
	}
	if data, _ := os.ReadFile(file); string(data) != "precious" {
		t.Error("the file is gone")
	}

	foreign, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = foreign.Close() }()
	if _, err := api.ClaimSocket(path, ""); !errors.Is(err, api.ErrSocketInUse) {
		t.Errorf("another program's socket: %v", err)
	}
	if _, err := api.ClaimSocket(filepath.Join(dir, "no", "such", "dir"), ""); err == nil {
		t.Error("a directory that is not there")
	}
}

// A path longer than sockaddr_un is served and found all the same.
func TestLongSocketPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30), "dir")
	name := strings.Repeat("n", 64)
	c, _ := serve(t, dir, name, &fakeVM{})
	if len(c.Socket()) <= 107 {
		t.Fatalf("%d bytes are not long", len(c.Socket()))
	}
	if info, err := c.Info(context.Background()); err != nil || info.Name != name {
		t.Errorf("%+v, %v", info, err)
	}
	if _, err := api.Find(context.Background(), dir, ""); err != nil {
		t.Error(err)
	}
}

func TestFindAndList(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "none yet")
	if e, err := api.List(ctx, dir); err != nil || len(e) != 0 {
		t.Errorf("no directory: %v, %v", e, err)
	}
	if _, err := api.Find(ctx, dir, ""); !errors.Is(err, api.ErrNotRunning) {
		t.Errorf("no VM: %v", err)
	}
	_, stop := serve(t, dir, "b", &fakeVM{info: vmm.Info{State: vmm.StateRunning, CPUs: 2}})
	if c, err := api.Find(ctx, dir, ""); err != nil || filepath.Base(c.Socket()) != "b.sock" {
		t.Errorf("the only VM: %v", err)
	}
	serve(t, dir, "a", &fakeVM{info: vmm.Info{State: vmm.StatePaused}})
	if _, err := api.Find(ctx, dir, ""); !errors.Is(err, api.ErrAmbiguous) || !strings.Contains(err.Error(), "a, b") {
		t.Errorf("two VMs: %v", err)
	}
	gone := &fakeVM{info: vmm.Info{State: vmm.StateMigrated}}
	serve(t, dir, "0", gone)
	if _, err := api.Find(ctx, dir, ""); !errors.Is(err, api.ErrAmbiguous) || strings.Contains(err.Error(), "0,") {
		t.Errorf("two VMs and one whose guest has moved away: %v", err)
	}
	if c, err := api.Find(ctx, dir, "", "paused"); err != nil || filepath.Base(c.Socket()) != "b.sock" {
		t.Errorf("passing over what is paused: %v", err)
	}
	if _, err := api.Find(ctx, dir, "", "paused", "running"); !errors.Is(err, api.ErrAmbiguous) {
		t.Errorf("passing over all: %v", err)
	}
	_ = gone.set("running")
	if _, err := api.Find(ctx, dir, "c"); !errors.Is(err, api.ErrNotRunning) {
		t.Errorf("none of that name: %v", err)
	}
	if _, err := api.Find(ctx, dir, "../b"); !errors.Is(err, vmm.ErrInvalid) {
		t.Errorf("a path as name: %v", err)
	}
	entries, err := api.List(ctx, dir)
	if err != nil || len(entries) != 3 {
		t.Fatalf("%v, %v", entries, err)
	}
	entries = entries[1:]
	if got := fmt.Sprint(entries[0].Name, entries[0].Info.State, entries[1].Name, entries[1].Info.CPUs); got != "apausedb2" {
		t.Errorf("List: %s", got)
	}
	stop()
	if e, err := api.List(ctx, dir); err != nil || len(e) != 2 {
		t.Errorf("after one stopped: %v, %v", e, err)
	}
}

// A process that hangs does not hide the others.
func TestListWithHungProcess(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, "alive", &fakeVM{})
	hung, err := net.Listen("unix", filepath.Join(dir, "hung.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = hung.Close() }()
	entries, err := api.List(context.Background(), dir)
	if err != nil || len(entries) != 2 {
		t.Fatalf("%v, %v", entries, err)
	}
	if entries[0].Err != nil || !errors.Is(entries[1].Err, api.ErrNoAnswer) {
		t.Errorf("alive: %v; hung: %v, want ErrNoAnswer", entries[0].Err, entries[1].Err)
	}
}
