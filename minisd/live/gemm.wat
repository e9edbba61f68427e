;; The matrix product, C = A B + bias: nearly all of the time of a drawing is spent in here.
;;
;; Every convolution, every linear layer and both products of attention are brought to this one form (layers.js):
;;
;;     C [M N] = A [M K] · B [K N]        A: the weights, in rows as they are stored;  B: pixels or tokens, in columns
;;
;; WebAssembly's SIMD instructions compute with four float32 at once (v128). Two functions use them:
;;
;;     pack    gathers B into panels of 8 columns, so that `gemm` reads it from front to back
;;     gemm    multiplies a block of 4 rows of A by a panel of 8 columns of B, again and again
;;
;; All sizes in memory (addresses, strides, the tables of `pack`) are in bytes; M, N, K and the number of panels are counts.
;; Assembled by npm's wabt into the bytes in gemm.js:   npx --package wabt wat2wasm gemm.wat -o - | base64 -w 0
(module
  (import "live" "memory" (memory 1))

  ;; B [K, 8 · panels] -> panels [K 8], one after the other. Element (k, j) of B lies at src + rows[k] + cols[j].
  ;; With two tables of offsets, one function reads every kind of B: a plain matrix (rows[k] = k · stride), and the
  ;; patches of a convolution (im2col), where k stands for a channel and a place in the kernel, j for an output pixel.
  (func (export "pack")
    (param $src i32) (param $cols i32) (param $rows i32) (param $K i32) (param $panels i32) (param $dst i32)
    (local $k i32) (local $row i32) (local $from i32)
    (local $j0 i32) (local $j1 i32) (local $j2 i32) (local $j3 i32)
    (local $j4 i32) (local $j5 i32) (local $j6 i32) (local $j7 i32)
    (loop $next_panel
      ;; where each of the panel's 8 columns begins
      (local.set $j0 (i32.add (local.get $src) (i32.load offset=0 (local.get $cols))))
      (local.set $j1 (i32.add (local.get $src) (i32.load offset=4 (local.get $cols))))
      (local.set $j2 (i32.add (local.get $src) (i32.load offset=8 (local.get $cols))))
      (local.set $j3 (i32.add (local.get $src) (i32.load offset=12 (local.get $cols))))
      (local.set $j4 (i32.add (local.get $src) (i32.load offset=16 (local.get $cols))))
      (local.set $j5 (i32.add (local.get $src) (i32.load offset=20 (local.get $cols))))
      (local.set $j6 (i32.add (local.get $src) (i32.load offset=24 (local.get $cols))))
      (local.set $j7 (i32.add (local.get $src) (i32.load offset=28 (local.get $cols))))
      (local.set $cols (i32.add (local.get $cols) (i32.const 32)))
      (local.set $k (local.get $K))
      (local.set $from (local.get $rows))
      ;; Offsets rise from column to column, so four that span 12 bytes are neighbours, and are copied as one v128. (What
      ;; fills up the last panel has the first offset, which is the smallest.)
      (if (i32.and (i32.eq (i32.sub (local.get $j3) (local.get $j0)) (i32.const 12))
                   (i32.eq (i32.sub (local.get $j7) (local.get $j4)) (i32.const 12)))
        (then (loop $next_row
          (local.set $row (i32.load (local.get $from)))
          (v128.store offset=0 (local.get $dst) (v128.load (i32.add (local.get $row) (local.get $j0))))
          (v128.store offset=16 (local.get $dst) (v128.load (i32.add (local.get $row) (local.get $j4))))
          (local.set $dst (i32.add (local.get $dst) (i32.const 32)))
          (local.set $from (i32.add (local.get $from) (i32.const 4)))
          (br_if $next_row (local.tee $k (i32.sub (local.get $k) (i32.const 1))))))
        (else (loop $next_row
          (local.set $row (i32.load (local.get $from)))
          (f32.store offset=0 (local.get $dst) (f32.load (i32.add (local.get $row) (local.get $j0))))
          (f32.store offset=4 (local.get $dst) (f32.load (i32.add (local.get $row) (local.get $j1))))
          (f32.store offset=8 (local.get $dst) (f32.load (i32.add (local.get $row) (local.get $j2))))
          (f32.store offset=12 (local.get $dst) (f32.load (i32.add (local.get $row) (local.get $j3))))
          (f32.store offset=16 (local.get $dst) (f32.load (i32.add (local.get $row) (local.get $j4))))
          (f32.store offset=20 (local.get $dst) (f32.load (i32.add (local.get $row) (local.get $j5))))
          (f32.store offset=24 (local.get $dst) (f32.load (i32.add (local.get $row) (local.get $j6))))
          (f32.store offset=28 (local.get $dst) (f32.load (i32.add (local.get $row) (local.get $j7))))
          (local.set $dst (i32.add (local.get $dst) (i32.const 32)))
          (local.set $from (i32.add (local.get $from) (i32.const 4)))
          (br_if $next_row (local.tee $k (i32.sub (local.get $k) (i32.const 1)))))))
      (br_if $next_panel (local.tee $panels (i32.sub (local.get $panels) (i32.const 1))))))

  ;; The first n of the 8 numbers in x and y -> memory. Only the last panel of a row of C has fewer than 8.
  (func $store (param $to i32) (param $n i32) (param $x v128) (param $y v128)
    (if (i32.ge_s (local.get $n) (i32.const 4))
      (then
        (v128.store (local.get $to) (local.get $x))
        (if (i32.ge_s (local.get $n) (i32.const 8))
          (then (v128.store offset=16 (local.get $to) (local.get $y)) (return)))
        (local.set $x (local.get $y))
        (local.set $to (i32.add (local.get $to) (i32.const 16)))
        (local.set $n (i32.sub (local.get $n) (i32.const 4)))))
    (if (i32.ge_s (local.get $n) (i32.const 1)) (then (v128.store32_lane offset=0 0 (local.get $to) (local.get $x))))
    (if (i32.ge_s (local.get $n) (i32.const 2)) (then (v128.store32_lane offset=4 1 (local.get $to) (local.get $x))))
    (if (i32.ge_s (local.get $n) (i32.const 3)) (then (v128.store32_lane offset=8 2 (local.get $to) (local.get $x)))))

  ;; C [M N] = A [M K] · B + bias, with B [K N] in the panels that `pack` made. `bias` is the address of M numbers, or 0
  ;; for none. If `add` is 1, the product is added to what C holds. `lda` and `ldc`: from one row to the next.
  (func (export "gemm")
    (param $M i32) (param $N i32) (param $K i32) (param $a i32) (param $lda i32) (param $b i32)
    (param $c i32) (param $ldc i32) (param $bias i32) (param $add i32)
    (local $m i32) (local $last i32) (local $r1 i32) (local $r2 i32) (local $r3 i32) (local $left i32) (local $k i32)
    (local $panel i32)
    (local $a0 i32) (local $a1 i32) (local $a2 i32) (local $a3 i32)
    (local $c0 i32) (local $c1 i32) (local $c2 i32) (local $c3 i32)
    (local $x v128) (local $b0 v128) (local $b1 v128)
    ;; the block of C, 4 × 8 numbers, which stays in registers until it is finished
    (local $c00 v128) (local $c01 v128) (local $c10 v128) (local $c11 v128)
    (local $c20 v128) (local $c21 v128) (local $c30 v128) (local $c31 v128)
    (local.set $last (i32.sub (local.get $M) (i32.const 1)))
    (loop $next_rows
      ;; The four rows m, m+1, m+2, m+3. Where M is no multiple of 4, the last row stands in for those that are missing:
      ;; it is then computed more than once, and written to the same place.
      (local.set $r1 (i32.add (local.get $m) (i32.const 1)))
      (local.set $r2 (i32.add (local.get $m) (i32.const 2)))
      (local.set $r3 (i32.add (local.get $m) (i32.const 3)))
      (local.set $r1 (select (local.get $r1) (local.get $last) (i32.lt_s (local.get $r1) (local.get $last))))
      (local.set $r2 (select (local.get $r2) (local.get $last) (i32.lt_s (local.get $r2) (local.get $last))))
      (local.set $r3 (select (local.get $r3) (local.get $last) (i32.lt_s (local.get $r3) (local.get $last))))
      (local.set $c0 (i32.add (local.get $c) (i32.mul (local.get $m) (local.get $ldc))))
      (local.set $c1 (i32.add (local.get $c) (i32.mul (local.get $r1) (local.get $ldc))))
      (local.set $c2 (i32.add (local.get $c) (i32.mul (local.get $r2) (local.get $ldc))))
      (local.set $c3 (i32.add (local.get $c) (i32.mul (local.get $r3) (local.get $ldc))))
      (local.set $panel (local.get $b))
      (local.set $left (local.get $N))
      (loop $next_panel
        ;; each row of the block begins with its bias …
        (if (local.get $bias)
          (then
            (local.set $x (v128.load32_splat (i32.add (local.get $bias) (i32.shl (local.get $m) (i32.const 2)))))
            (local.set $c00 (local.get $x)) (local.set $c01 (local.get $x))
            (local.set $x (v128.load32_splat (i32.add (local.get $bias) (i32.shl (local.get $r1) (i32.const 2)))))
            (local.set $c10 (local.get $x)) (local.set $c11 (local.get $x))
            (local.set $x (v128.load32_splat (i32.add (local.get $bias) (i32.shl (local.get $r2) (i32.const 2)))))
            (local.set $c20 (local.get $x)) (local.set $c21 (local.get $x))
            (local.set $x (v128.load32_splat (i32.add (local.get $bias) (i32.shl (local.get $r3) (i32.const 2)))))
            (local.set $c30 (local.get $x)) (local.set $c31 (local.get $x)))
          (else
            (local.set $x (v128.const i32x4 0 0 0 0))
            (local.set $c00 (local.get $x)) (local.set $c01 (local.get $x))
            (local.set $c10 (local.get $x)) (local.set $c11 (local.get $x))
            (local.set $c20 (local.get $x)) (local.set $c21 (local.get $x))
            (local.set $c30 (local.get $x)) (local.set $c31 (local.get $x))))
        ;; … and with what stands in C already
        (if (local.get $add)
          (then
            (local.set $c00 (f32x4.add (local.get $c00) (v128.load offset=0 (local.get $c0))))
            (local.set $c01 (f32x4.add (local.get $c01) (v128.load offset=16 (local.get $c0))))
            (local.set $c10 (f32x4.add (local.get $c10) (v128.load offset=0 (local.get $c1))))
            (local.set $c11 (f32x4.add (local.get $c11) (v128.load offset=16 (local.get $c1))))
            (local.set $c20 (f32x4.add (local.get $c20) (v128.load offset=0 (local.get $c2))))
            (local.set $c21 (f32x4.add (local.get $c21) (v128.load offset=16 (local.get $c2))))
            (local.set $c30 (f32x4.add (local.get $c30) (v128.load offset=0 (local.get $c3))))
            (local.set $c31 (f32x4.add (local.get $c31) (v128.load offset=16 (local.get $c3))))))
        (local.set $a0 (i32.add (local.get $a) (i32.mul (local.get $m) (local.get $lda))))
        (local.set $a1 (i32.add (local.get $a) (i32.mul (local.get $r1) (local.get $lda))))
        (local.set $a2 (i32.add (local.get $a) (i32.mul (local.get $r2) (local.get $lda))))
        (local.set $a3 (i32.add (local.get $a) (i32.mul (local.get $r3) (local.get $lda))))
        (local.set $k (local.get $K))
        (loop $next_k
          ;; one row of the panel, 8 numbers, times one number of each of the four rows of A
          (local.set $b0 (v128.load offset=0 (local.get $panel)))
          (local.set $b1 (v128.load offset=16 (local.get $panel)))
          (local.set $x (v128.load32_splat (local.get $a0)))
          (local.set $c00 (f32x4.add (local.get $c00) (f32x4.mul (local.get $x) (local.get $b0))))
          (local.set $c01 (f32x4.add (local.get $c01) (f32x4.mul (local.get $x) (local.get $b1))))
          (local.set $x (v128.load32_splat (local.get $a1)))
          (local.set $c10 (f32x4.add (local.get $c10) (f32x4.mul (local.get $x) (local.get $b0))))
          (local.set $c11 (f32x4.add (local.get $c11) (f32x4.mul (local.get $x) (local.get $b1))))
          (local.set $x (v128.load32_splat (local.get $a2)))
          (local.set $c20 (f32x4.add (local.get $c20) (f32x4.mul (local.get $x) (local.get $b0))))
          (local.set $c21 (f32x4.add (local.get $c21) (f32x4.mul (local.get $x) (local.get $b1))))
          (local.set $x (v128.load32_splat (local.get $a3)))
          (local.set $c30 (f32x4.add (local.get $c30) (f32x4.mul (local.get $x) (local.get $b0))))
          (local.set $c31 (f32x4.add (local.get $c31) (f32x4.mul (local.get $x) (local.get $b1))))
          (local.set $panel (i32.add (local.get $panel) (i32.const 32)))
          (local.set $a0 (i32.add (local.get $a0) (i32.const 4)))
          (local.set $a1 (i32.add (local.get $a1) (i32.const 4)))
          (local.set $a2 (i32.add (local.get $a2) (i32.const 4)))
          (local.set $a3 (i32.add (local.get $a3) (i32.const 4)))
          (br_if $next_k (local.tee $k (i32.sub (local.get $k) (i32.const 1)))))
        (call $store (local.get $c0) (local.get $left) (local.get $c00) (local.get $c01))
        (call $store (local.get $c1) (local.get $left) (local.get $c10) (local.get $c11))
        (call $store (local.get $c2) (local.get $left) (local.get $c20) (local.get $c21))
        (call $store (local.get $c3) (local.get $left) (local.get $c30) (local.get $c31))
        (local.set $c0 (i32.add (local.get $c0) (i32.const 32)))
        (local.set $c1 (i32.add (local.get $c1) (i32.const 32)))
        (local.set $c2 (i32.add (local.get $c2) (i32.const 32)))
        (local.set $c3 (i32.add (local.get $c3) (i32.const 32)))
        (br_if $next_panel (i32.gt_s (local.tee $left (i32.sub (local.get $left) (i32.const 8))) (i32.const 0))))
      (br_if $next_rows
        (i32.lt_s (local.tee $m (i32.add (local.get $m) (i32.const 4))) (local.get $M))))))
