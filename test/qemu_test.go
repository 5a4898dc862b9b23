package test

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/guest"
	"github.com/govmm/govmm/internal/testenv"
)

// qemu is a QEMU with our demo guest, for comparison: the same ELF and command line.
// Where /dev/kvm does not open it interprets the guest (TCG); its migration is the same
// code.
type qemu struct {
	tb  testing.TB
	cmd *exec.Cmd
	out *lines // the guest's serial port
	qmp net.Conn
	dec *json.Decoder
	end func() // kills it

	bandwidth int64         // that migrate may use, in bytes a second; 0: all
	limit     time.Duration // of the downtime; 0: the default

	events map[string]time.Time // of each name, the last that do has read
}

// qemuAccel returns QEMU's accelerator on this machine.
func qemuAccel() string {
	if testenv.NoKVM() != nil {
		return "tcg"
	}
	return "kvm"
}

// startQEMU starts a QEMU. With incoming it waits for a guest; more is added to its
// command line.
func startQEMU(tb testing.TB, memMiB, cpus int, cmdline string, incoming bool, more ...string) *qemu {
	tb.Helper()
	binary := qemuBinary()
	if binary == "" {
		tb.Skip("NO QEMU HERE, NOT COMPARED")
	}
	dir, err := os.MkdirTemp("", "gq")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	elf, socket := filepath.Join(dir, "demo.elf"), filepath.Join(dir, "qmp")
	if err := os.WriteFile(elf, guest.ELF, 0o600); err != nil {
		tb.Fatal(err)
	}
	accel, cpu := qemuAccel(), "max"
	if accel == "kvm" {
		cpu = "host,-arch-capabilities"
	}
	args := []string{"-accel", accel, "-cpu", cpu, "-M", "pc", "-m", fmt.Sprintf("%dM", memMiB), "-smp", fmt.Sprint(cpus),
		"-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", elf, "-append", cmdline,
		"-qmp", "unix:" + socket + ",server=on,wait=off"}
	if incoming {
		args = append(args, "-incoming", "defer")
	}
	args = append(args, more...)
	q := &qemu{tb: tb, cmd: exec.Command(binary, args...), out: newLines(), events: map[string]time.Time{}}
	q.cmd.Stderr = os.Stderr
	stdout, err := q.cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := q.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		q.out.from(stdout)
		close(read)
	}()
	q.end = sync.OnceFunc(func() {
		_ = q.cmd.Process.Kill()
		<-read
		_ = q.cmd.Wait() // killed
		if q.qmp != nil {
			q.qmp.Close()
		}
	})
	tb.Cleanup(q.end)
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if q.qmp, err = net.Dial("unix", socket); err == nil {
			break
		}
		if time.Now().After(deadline) {
			tb.Fatal(err)
		}
	}
	q.dec = json.NewDecoder(q.qmp)
	var greeting map[string]any
	if err := q.dec.Decode(&greeting); err != nil {
		tb.Fatal(err)
	}
	q.do("qmp_capabilities", nil)
	return q
}

// do executes a QMP command and returns its answer. It records the times of events.
func (q *qemu) do(command string, arguments any) json.RawMessage {
	q.tb.Helper()
	msg := map[string]any{"execute": command}
	if arguments != nil {
		msg["arguments"] = arguments
	}
	if err := json.NewEncoder(q.qmp).Encode(msg); err != nil {
		q.tb.Fatal(err)
	}
	for {
		var answer struct {
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
			Event     string `json:"event"`
			Timestamp struct{ Seconds, Microseconds int64 }
		}
		if err := q.dec.Decode(&answer); err != nil {
			q.tb.Fatalf("QMP %s: %v", command, err)
		}
		switch {
		case answer.Error != nil:
			q.tb.Fatalf("QMP %s: %s", command, answer.Error.Desc)
		case answer.Event == "":
			return answer.Return
		}
		q.events[answer.Event] = time.Unix(answer.Timestamp.Seconds, answer.Timestamp.Microseconds*1000)
	}
}

// qemuResult is the result of a migration by QEMU.
type qemuResult struct {
	Total    time.Duration // from the command to RESUME at the destination
	Downtime time.Duration // from STOP at the source to RESUME at the destination
	Sent     time.Duration // the downtime that QEMU reports: until the source has sent all
	Bytes    uint64
}

// migrate moves the guest to dst by n connections: more than one is multifd.
func (q *qemu) migrate(dst *qemu, n int) qemuResult {
	q.tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		q.tb.Fatal(err)
	}
	uri := "tcp:" + ln.Addr().String()
	ln.Close()
	bandwidth := q.bandwidth
	if bandwidth == 0 {
		bandwidth = 1 << 40
	}
	limit := q.limit.Milliseconds()
	if limit == 0 {
		limit = downtimeLimit
	}
	for _, end := range []*qemu{dst, q} {
		parameters := map[string]any{"downtime-limit": limit, "max-bandwidth": bandwidth}
		// Turn it off too: a guest that came by multifd has it on.
		end.do("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "multifd", "state": n > 1}}})
		if n > 1 {
			parameters["multifd-channels"] = n
		}
		end.do("migrate-set-parameters", parameters)
	}
	dst.do("migrate-incoming", map[string]any{"uri": uri})
	began := time.Now()
	q.do("migrate", map[string]any{"uri": uri})
	for deadline := time.Now().Add(10 * patience); ; time.Sleep(5 * time.Millisecond) {
		var info struct {
			Status   string `json:"status"`
			Downtime int64  `json:"downtime"`
			Error    string `json:"error-desc"`
			RAM      struct {
				Transferred uint64 `json:"transferred"`
			} `json:"ram"`
		}
		if err := json.Unmarshal(q.do("query-migrate", nil), &info); err != nil {
			q.tb.Fatal(err)
		}
		switch {
		case info.Status == "completed":
			dst.awaitRunning()
			return qemuResult{dst.events["RESUME"].Sub(began), dst.events["RESUME"].Sub(q.events["STOP"]),
				time.Duration(info.Downtime) * time.Millisecond, info.RAM.Transferred}
		case info.Status == "failed" || time.Now().After(deadline):
			q.tb.Fatalf("QEMU's migration is %s: %s", info.Status, info.Error)
		}
	}
}

// awaitRunning waits until the guest runs and its RESUME was recorded.
func (q *qemu) awaitRunning() {
	q.tb.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		var status struct{ Running bool }
		if err := json.Unmarshal(q.do("query-status", nil), &status); err != nil {
			q.tb.Fatal(err)
		}
		if _, resumed := q.events["RESUME"]; resumed && status.Running {
			return
		}
		if time.Now().After(deadline) {
			q.tb.Fatal("QEMU's guest has arrived and does not run")
		}
	}
}

// TestQEMUHarness: the harness moves QEMU's guest by one connection and by two.
func TestQEMUHarness(t *testing.T) {
	testenv.NotShort(t, "QEMU may have to interpret the guest")
	for _, n := range []int{1, 2} {
		src := startQEMU(t, 128, 1, "fill=8M dirty=1M rate=100 tick=1", false)
		src.out.awaitText(t, 0, "filled ")
		dst := startQEMU(t, 128, 1, "fill=8M dirty=1M rate=100 tick=1", true)
		if r := src.migrate(dst, n); r.Bytes < 8*mib || r.Total == 0 || r.Downtime <= 0 || r.Downtime > patience {
			t.Errorf("%d connections: %+v", n, r)
		} else {
			t.Logf("%d connections: %+v", n, r)
		}
		dst.out.awaitTick(t, 0, "at the destination", func(tick) bool { return true })
	}
}
